"""Owns the picture of an adapter's work: validation images, what their labels say, and what the head tells."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from densedino.adapters.labels import read_truth
from densedino.features.colours import heat_colours
from densedino.features.pictures import Picture
from densedino.features.sheet import Row, draw_sheet
from densedino.images.decoding import read_image
from densedino.images.labelled import evenly
from densedino.tasks.drawing import class_colours

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from densedino.adapters.adapted import Adapter
    from densedino.adapters.labels import Example
    from densedino.adapters.tasks import Task

__all__ = ["draw_examples"]

_SHOWN, _SIDE = 4, 320  # images, and pixels of their longer side
_NOTHING = np.array([0, 0, 0], np.uint8)  # where there is no label


def draw_examples(adapter: Adapter, examples: Sequence[Example], *, heading: str) -> Image.Image:
    """A sheet of at most four examples, evenly taken: the photograph, its labels, and the prediction.

    Args:
        adapter: of segmentation or depth.
        examples: with labels.
        heading: what stands on top.
    """
    rows, task = [], adapter.spec.task
    for example in (examples[i] for i in evenly(len(examples), _SHOWN)):
        truth, told = read_truth(task, example), adapter(example.image)[0]
        told_map = told.labels if told.labels is not None else told.depth
        assert isinstance(truth, torch.Tensor) and told_map is not None
        photo = _small(Image.fromarray(read_image(example.image, in_chans=3).array))
        scale = None if task.kind == "segmentation" else (0.0, task.most_depth)
        pictures = [
            Picture(image=_small(_coloured(task, values)), title=title, scale=scale)
            for title, values in (("labels", truth), ("prediction", told_map))
        ]
        rows.append(Row(photo=photo, caption=(example.image.name, ""), pictures=pictures))
    return draw_sheet(rows, heading=heading)


def _coloured(task: Task, values: Tensor) -> Image.Image:
    """Classes in colours of their own, or depth from 0 to the largest as heat; black where nothing is known."""
    if task.kind == "segmentation":
        known = values != task.ignore
        colours = class_colours(len(task.classes))[values.where(known, torch.tensor(0)).numpy()]
    else:
        known = values.isfinite() & (values > 0)
        heat = heat_colours((values.nan_to_num() / task.most_depth).clamp(0, 1))
        colours = (heat * 255).round().byte().numpy()
    return Image.fromarray(np.where(known.numpy()[..., None], colours, _NOTHING))


def _small(image: Image.Image) -> Image.Image:
    image = image.convert("RGB")
    factor = _SIDE / max(image.size)
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    return image.resize(size, Image.Resampling.NEAREST if factor > 1 else Image.Resampling.BOX)
