"""Pieces of the supervised baseline (trained in test_segmentation)."""

from __future__ import annotations

import torch

from densedino.evals.unet import _crop, _schedule, _shrunk


def test_crops_move_picture_and_labels_together_and_pad_with_void() -> None:
    labels = torch.arange(20 * 30).view(20, 30).short()
    picture = labels[None].expand(3, -1, -1).clone()
    generator = torch.Generator().manual_seed(0)
    for _ in range(8):
        image, target = _crop(picture, labels, side=12, void=-1, generator=generator)
        assert image.shape == (3, 12, 12) and torch.equal(image[0], target)
    _, padded = _crop(picture, labels, side=24, void=-1, generator=generator)
    assert padded.shape == (24, 24) and int((padded == -1).sum()) == 4 * 24


def test_labels_of_a_smaller_picture_are_whole_numbers_from_the_middle() -> None:
    labels = torch.tensor([[0, 0, 5, 5], [0, 0, 5, 5]])
    assert _shrunk(labels, torch.zeros(3, 1, 2)).tolist() == [[0, 5]]
    assert 0 < _schedule(0, 100) < _schedule(4, 100) == 1 and _schedule(99, 100) < 0.01
