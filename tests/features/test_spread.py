"""Shares are parts without overlap; what is missing for several processes is said."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from densedino.errors import InputError
from densedino.features.spread import Share, the_share


@given(count=st.integers(0, 1000), world=st.integers(1, 40))
def test_shares_are_nearly_equal_parts_of_all(count, world):
    parts = [Share(rank, world).of(count) for rank in range(world)]
    assert [number for part in parts for number in part] == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_one_process_has_all_and_waits_for_nobody(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with the_share() as share:
        share.wait()
        assert share == Share(0, 1)


def test_half_an_environment_of_torchrun_is_an_error(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError, match="torchrun"), the_share():
        pass
