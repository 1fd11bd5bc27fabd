from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from densedino.heads.positions import sine_features, sine_grid

if TYPE_CHECKING:
    from collections.abc import Callable

    from heads.conftest import Golden


def test_positions_are_golden(golden: Callable[[str], Golden]) -> None:
    file = golden("sine_pos")
    padding = file["in/mask"]
    everywhere = torch.ones_like(padding)
    for valid, centred, name in (
        (everywhere, False, "segmentation"),
        (everywhere, True, "detection_nomask"),
        (~padding, True, "detection_masked"),
    ):
        assert torch.allclose(sine_grid(valid, features=16, centred=centred), file[f"out/{name}"], atol=1e-6), name


def test_features_are_sines_and_cosines_in_turn() -> None:
    out = sine_features(torch.tensor([0.5]), features=4)[0]
    assert torch.allclose(out, torch.tensor([math.sin(0.5), math.cos(0.5), math.sin(0.005), math.cos(0.005)]))


def test_y_comes_before_x() -> None:
    position = sine_grid(torch.ones(1, 3, 5, dtype=torch.bool), features=8, centred=False)[0]
    assert torch.equal(position[:4, :, 0], position[:4, :, 4]) and not torch.equal(position[:4, 0], position[:4, 2])
    assert torch.equal(position[4:, 0], position[4:, 2])
