from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import densedino as dd
from densedino.errors import InputError


def test_boxes_in_the_pictures_own_pixels() -> None:
    model = dd.load("debug_vit-detr", weights="random")
    image = np.random.default_rng(0).integers(0, 255, (120, 400, 3), dtype=np.uint8)
    (found,) = model(image, threshold=0.0)
    assert found.boxes.shape == (20, 4) and (found.boxes >= 0).all()
    assert (found.boxes <= torch.tensor([400.0, 120, 400, 120]) + 1e-3).all()
    assert torch.equal(found.scores, found.scores.sort(descending=True).values)
    some = float(found.scores[5])
    assert len(model(image, threshold=some)[0].boxes) == 6
    assert len(model(image, threshold=1.0)[0].boxes) == 0
    with pytest.raises(InputError, match="between 0 and 1"):
        model(image, threshold=2)


def test_small_and_large_pictures_are_brought_to_a_size_that_can_be_had() -> None:
    model = dd.load("debug_vit-detr", weights="random")
    assert model._size(600, 800) is None
    assert model._size(144, 200) == (288, 400)
    assert model._size(3000, 4096) == (1500, 2048)
    assert replace(model, resize=(64, 64))._size(600, 800) == (64, 64)
