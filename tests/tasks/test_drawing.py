from __future__ import annotations

import numpy as np
import torch

from densedino.heads.bins import Bins
from densedino.images.decoding import read_image
from densedino.tasks.boxes import Found
from densedino.tasks.depth import DepthMap
from densedino.tasks.drawing import (
    PER_METRE,
    boxes_sheet,
    class_colours,
    classes_sheet,
    depth_image,
    depth_sheet,
    label_image,
)
from densedino.tasks.masks import ClassMap

PHOTO = read_image(np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8))


def test_depth_is_kept_in_levels() -> None:
    metres = torch.linspace(0, 300, 60 * 90).view(60, 90)
    levels = np.asarray(depth_image(DepthMap(metres, Bins(most=300.0))))
    assert levels.dtype == np.uint16 and levels.max() == 65535
    near = metres.numpy() < 255
    assert np.abs(levels[near] / PER_METRE - metres.numpy()[near]).max() <= 0.5 / PER_METRE
    sheet = depth_sheet(DepthMap(metres, Bins(most=300.0)), PHOTO, title="depth, metres", heading="h")
    assert sheet.mode == "RGB" and sheet.width > 2 * 90


def test_class_numbers_are_kept_and_coloured() -> None:
    classes = np.arange(60 * 90, dtype=np.int64).reshape(60, 90).astype(np.uint8) % 150
    names = [f"class {i}" for i in range(150)]
    image = label_image(classes, names)
    assert image.mode == "P" and np.array_equal(np.asarray(image), classes)
    assert np.array_equal(np.asarray(image.convert("RGB"))[0, 3], class_colours(150)[3])
    assert len({tuple(c) for c in class_colours(150)}) > 140
    found = ClassMap(torch.from_numpy(classes), torch.ones(60, 90), tuple(names))
    assert classes_sheet(found, PHOTO, heading="h", alarm="UNTRAINED").height > 60


def test_boxes_are_drawn_where_they_are() -> None:
    box = torch.tensor([[10.0, 20, 60, 50]])
    found = Found(box, torch.tensor([1]), torch.tensor([0.9]), ("", "person"))
    with_box = np.asarray(boxes_sheet(found, PHOTO, heading="h"))
    none = Found(box[:0], torch.tensor([], dtype=torch.int64), torch.tensor([]), ("", "person"))
    without = np.asarray(boxes_sheet(none, PHOTO, heading="h"))
    assert with_box.shape == without.shape and (with_box != without).any(axis=2).sum() > 100
