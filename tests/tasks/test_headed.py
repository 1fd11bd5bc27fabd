from __future__ import annotations

import numpy as np
import torch

import densedino as dd
from densedino.tasks.headed import decoded, images_of


def test_pixels_are_normalised_by_the_heads_statistics_not_the_backbones() -> None:
    headed = dd.load("debug_vit-lc", weights="random").headed
    white = np.full((20, 30, 3), 255, np.uint8)
    pixels, size = headed.pixels_of(white, resize=(32, 48))
    assert size == (20, 30) and pixels.shape == (3, 32, 48)
    expected = [(1 - m) / s for m, s in zip(headed.spec.mean, headed.spec.std, strict=True)]
    assert torch.allclose(pixels.mean((1, 2)), torch.tensor(expected), atol=1e-5)


def test_taps_come_in_the_heads_order_though_doubled() -> None:
    headed = dd.load("debug_vit-dpt", weights="random").headed
    taps = headed.tokens_of(torch.randn(1, 3, 32, 48))
    assert headed.spec.layers == (0, 0, 1, 1)
    assert torch.equal(taps[0].patches, taps[1].patches) and not torch.equal(taps[1].patches, taps[2].patches)


def test_one_or_several() -> None:
    image = np.zeros((4, 4, 3), np.uint8)
    assert len(images_of(image)) == 1 and len(images_of([image, image])) == 2
    assert decoded(decoded(image)).array.shape == (4, 4, 3)
