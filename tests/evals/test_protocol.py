"""The table of protocols."""

from __future__ import annotations

from dataclasses import is_dataclass

import pytest

from densedino.config import from_dict, to_dict
from densedino.evals.protocol import PROTOCOLS, find_protocol


@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_protocol_is_whole(name: str) -> None:
    protocol = find_protocol(name)
    assert protocol.name == name and is_dataclass(protocol.settings) and protocol.rule
    settings = protocol.settings()
    assert from_dict(protocol.settings, to_dict(settings)) == settings
    assert protocol.heads(settings) and protocol.random_heads <= set(protocol.heads(settings))
