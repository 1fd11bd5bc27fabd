from __future__ import annotations

import dataclasses

import pytest

from densedino.heads import configs


@pytest.mark.parametrize("name", [name for name in configs.__all__ if name != "Config"])
def test_sizes_are_frozen_and_named(name: str) -> None:
    config = getattr(configs, name)
    assert dataclasses.is_dataclass(config) and config.__dataclass_params__.frozen
    with pytest.raises(TypeError):
        config(1)
