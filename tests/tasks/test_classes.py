from __future__ import annotations

import numpy as np
import pytest
import torch

import densedino as dd
from densedino.tasks.classes import Classes, centre_crop


def test_probabilities_of_several_images() -> None:
    model = dd.load("debug_vit-lc", weights="random")
    images = [np.random.default_rng(i).integers(0, 255, (60 + 40 * i, 100, 3), dtype=np.uint8) for i in range(2)]
    for one in model(images):
        assert one.probabilities.sum() == pytest.approx(1.0, abs=1e-5)
        top = one.top(3)
        assert len(top) == 3 and [p for _, p in top] == sorted((p for _, p in top), reverse=True)
    square = dd.load("debug_vit-lc", weights="random", resize=(64, 48))
    logits = square.headed.run(square.headed.pixels_of(images[0], resize=(64, 48))[0][None])
    assert torch.allclose(square(images[0])[0].probabilities, logits[0].softmax(-1), atol=1e-6)


def test_the_middle_is_taken() -> None:
    pixels = torch.arange(10.0).expand(3, 40, 10)
    assert centre_crop(torch.zeros(3, 256, 300), 224).shape == (3, 224, 224)
    assert centre_crop(torch.zeros(3, 70, 50), 16).shape == (3, 64, 48)
    assert centre_crop(pixels, 20).shape[1] == 20


def test_the_surest_come_first() -> None:
    assert Classes(torch.tensor([0.1, 0.7, 0.2]), ("a", "b", "c")).top(2) == [
        ("b", pytest.approx(0.7)),
        ("c", pytest.approx(0.2)),
    ]
