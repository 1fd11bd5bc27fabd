"""The picture of an adapter's work."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

import densedino as dd
from densedino.adapters.adapted import Adapter, AdapterSpec
from densedino.adapters.heads import HeadConfig, build_head
from densedino.adapters.labels import read_labelled
from densedino.adapters.shown import _coloured, draw_examples
from densedino.adapters.tasks import Task

if TYPE_CHECKING:
    from pathlib import Path


def test_photo_labels_and_prediction_stand_side_by_side(masks: Path, depths: Path) -> None:
    dino = dd.load("debug_vit", weights="random", engine="eager", device="cpu")
    for folder, task in (
        (masks, Task(kind="segmentation")),
        (depths, Task(kind="depth", depth_unit=0.001, most_depth=9)),
    ):
        found = read_labelled(folder, task)
        head = build_head(HeadConfig(), dino.model, found.task.purpose).eval()
        spec = AdapterSpec(task=found.task, head=HeadConfig(), layers=(1,))
        sheet = np.asarray(draw_examples(Adapter(dino, head, spec), found.val, heading="a heading"))
        assert sheet.shape[1] > 3 * 320 and sheet.shape[0] > 2 * 256
        assert len(np.unique(sheet.reshape(-1, 3), axis=0)) > 20


def test_each_class_has_its_colour_and_no_label_is_black() -> None:
    task = Task(kind="segmentation", classes=("a", "b"))
    pixels = np.asarray(_coloured(task, torch.tensor([[0, 1, 255]])))
    assert pixels[0, 2].tolist() == [0, 0, 0]
    assert pixels[0, 0].tolist() != pixels[0, 1].tolist()
