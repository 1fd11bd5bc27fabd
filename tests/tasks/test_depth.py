from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

import densedino as dd
from densedino.tasks import depth as depth_module
from densedino.tasks.depth import DepthEstimator

if TYPE_CHECKING:
    from torch import Tensor

IMAGE = np.random.default_rng(0).integers(0, 255, (70, 101, 3), dtype=np.uint8)


@pytest.mark.parametrize("name", ["debug_vit-dpt", "debug_vit-chm"])
def test_metres_at_the_pictures_own_pixels(name: str) -> None:
    model = dd.load(name, weights="random")
    (depth,) = model(IMAGE)
    assert depth.metres.shape == (70, 101) and depth.metres.dtype == torch.float32
    assert (depth.metres >= depth.bins.least * 0.99).all() and (depth.metres <= depth.bins.most).all()
    assert model.is_height == (name == "debug_vit-chm")


def test_the_published_size_is_a_square_for_depth_and_the_pictures_own_for_height(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[int, int]] = []

    def of_pixels(self: DepthEstimator, pixels: Tensor) -> Tensor:
        seen.append((pixels.shape[2], pixels.shape[3]))
        return pixels[:, :1]

    monkeypatch.setattr(DepthEstimator, "of_pixels", of_pixels)
    for name in ("debug_vit-dpt", "debug_vit-chm"):
        dd.load(name, weights="random")(IMAGE)
    dd.load("debug_vit-dpt", weights="random", resize=64)(IMAGE)
    assert seen == [(768, 768), (70, 101), (64, 92)]


def test_a_flip_is_undone() -> None:
    model = dd.load("debug_vit-chm", weights="random", resize=(64, 96))
    (first,), (second,) = model(IMAGE, flip=True), model(np.ascontiguousarray(IMAGE[:, ::-1]), flip=True)
    assert torch.allclose(first.metres.flip(1), second.metres, atol=1e-3)


def test_padding_around_is_cut_off_again() -> None:
    """What the head gives stands where the picture is: a map of columns comes back as these columns."""
    model = dd.load("debug_vit-chm", weights="random")

    class Columns:
        def run(self, pixels: Tensor) -> Tensor:
            padded = depth_module.math.ceil(pixels.shape[3] / 16) * 16
            return torch.arange(padded, dtype=torch.float32).expand(1, 1, 64, padded)

    out = replace(model, headed=Columns()).of_pixels(torch.zeros(1, 3, 64, 90))
    assert torch.equal(out[0, 0, 0], torch.arange(3.0, 93.0))


def test_a_large_picture_goes_in_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(depth_module, "_WINDOW", 64)
    monkeypatch.setattr(depth_module, "_STRIDE", 48)
    model = dd.load("debug_vit-chm", weights="random")
    (depth,) = model(np.random.default_rng(0).integers(0, 255, (60, 200, 3), dtype=np.uint8))
    assert depth.metres.shape == (60, 200) and depth.metres.isfinite().all()
