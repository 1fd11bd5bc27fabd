"""Owns labelled examples: which pictures train, which validate, and all that is wrong with labels, told before work."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from densedino.adapters.tasks import NOT_COUNTED, Task
from densedino.errors import InputError
from densedino.images.labelled import read_class_folder, read_depth, read_depth_folder, read_mask, read_mask_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from torch import Tensor

    from densedino.images.transforms import Geometry

__all__ = ["Example", "Labelled", "Window", "read_labelled", "read_truth", "sample_labels"]

_MOST_CLASSES = 4096  # more are ids of objects, or colours, not classes
_SIDEWAYS = frozenset({5, 6, 7, 8})  # EXIF orientations that swap height and width


@dataclass(frozen=True)
class Example:
    """A picture, and its mask, its depth map, or its class."""

    image: Path
    label: Path | int


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """Examples that were looked at: their labels fit the task and the pictures."""

    task: Task
    train: tuple[Example, ...]
    val: tuple[Example, ...]


def read_labelled(
    folder: Path,
    task: Task,
    *,
    classes: int | None = None,
    fraction: float = 1.0,
    seed: int = 0,
    advance: Callable[[int], None] = lambda count: None,
) -> Labelled:
    """Find the examples of a folder (see `images.labelled`), take a part of those for training, and look at all labels.

    Args:
        folder: images with masks, with depth maps, or in folders of classes.
        task: its classes are found here.
        classes: of masks; by default the largest label of training, and one more.
        fraction: of the training examples, drawn by `seed`; of each class by itself where images have classes.
        seed: of the draw.
        advance: called with the number of labels that were looked at.

    Raises:
        InputError: no such layout, missing labels, labels that are no class, sizes that differ, or a single class: the
            message names the file.
        ImageError: a mask or depth map that cannot be read.
    """
    if not 0 < fraction <= 1:
        raise InputError(f"fraction {fraction}: give a share of the training examples above 0, at most 1.")
    if not folder.is_dir():
        raise InputError(f"no folder {str(folder)!r}. Give a folder of images with their labels.")
    if task.kind == "classification":
        found = read_class_folder(folder)
        rng = np.random.default_rng(seed)
        train = tuple(
            Example(paths[i], label) for label, paths in enumerate(found.bank) for i in _draw(len(paths), fraction, rng)
        )
        val = tuple(Example(path, label) for label, paths in enumerate(found.queries) for path in paths)
        return Labelled(task=replace(task, classes=found.classes), train=train, val=val)
    pairs = read_mask_folder(folder) if task.kind == "segmentation" else read_depth_folder(folder)
    train = tuple(Example(*pairs.train[i]) for i in _draw(len(pairs.train), fraction, np.random.default_rng(seed)))
    val = tuple(Example(*pair) for pair in pairs.val)
    if not train or not val:
        raise InputError(
            f"{str(folder)!r} has {len(train)} images to train with and {len(val)} to validate; both need one."
        )
    task = _look(task, train, val, classes=classes, advance=advance)
    return Labelled(task=task, train=train, val=val)


def _draw(count: int, fraction: float, rng: np.random.Generator) -> list[int]:
    """Places in order, at least one."""
    return sorted(rng.permutation(count)[: max(1, round(count * fraction))].tolist()) if count else []


def _look(
    task: Task,
    train: Sequence[Example],
    val: Sequence[Example],
    *,
    classes: int | None,
    advance: Callable[[int], None],
) -> Task:
    """Read every label once, and return the task with its classes."""
    present: dict[int, Path] = {}
    for number, example in enumerate((*train, *val)):
        if number == len(train):
            task = _with_classes(task, present, classes)
        label = read_truth(task, example)
        assert not isinstance(example.label, int) and not isinstance(label, int)
        _check_size(example, tuple(label.shape))
        if task.kind == "segmentation":
            values = [value for value in label.unique().tolist() if value != task.ignore]
            limit = classes if number < len(train) else len(task.classes)
            _check_labels(values, example.label, limit=limit, ignore=task.ignore)
            for value in values:
                present.setdefault(value, example.label)
        elif not bool((label.isfinite() & (label > 0) & (label <= task.most_depth)).any()):
            raise InputError(
                f"{example.label}: no depth in it is above 0 and at most {task.most_depth:g} m. Is its unit another? "
                "Give the metres of one (--depth-unit 0.001 for millimetres), or the largest depth (--most-depth)."
            )
        advance(1)
    return task


def _check_labels(values: list[int], path: Path, *, limit: int | None, ignore: int) -> None:
    most = limit or _MOST_CLASSES
    if bad := [value for value in values if not 0 <= value < most]:
        what = f"0 to {most - 1}" if limit else f"numbers of classes, below {_MOST_CLASSES}"
        raise InputError(
            f"{path}: it has the label {bad[0]}; valid are {what}, and {ignore} for pixels of no class. Fix the mask, "
            "or give --classes or --ignore."
        )


def _with_classes(task: Task, present: dict[int, Path], classes: int | None) -> Task:
    if task.kind != "segmentation":
        return task
    if len(present) < 2:
        which = f"only class {min(present)}, as {present[min(present)]}" if present else f"only the label {task.ignore}"
        raise InputError(
            f"all masks of the training images hold {which}: there is nothing to tell apart. Give masks with two "
            "classes or more, or another --ignore."
        )
    return replace(task, classes=tuple(str(i) for i in range(classes or max(present) + 1)))


def _check_size(example: Example, label: tuple[int, ...]) -> None:
    try:
        with Image.open(example.image) as image:
            width, height = image.size
            if image.getexif().get(0x0112) in _SIDEWAYS:
                width, height = height, width
    except (OSError, UnidentifiedImageError):
        return  # whoever decodes it says what is wrong
    if (height, width) != label:
        raise InputError(
            f"{example.label}: it has {label[0]}×{label[1]} pixels (H×W), but its image {example.image} has "
            f"{height}×{width}. Labels must have the pixels of their image."
        )


def read_truth(task: Task, example: Example) -> Tensor | int:
    """The labels of an example as they are: classes [H, W] with `ignore`, metres [H, W], or a class.

    Raises:
        ImageError: it cannot be read.
    """
    if isinstance(example.label, int):
        return example.label
    return read_mask(example.label) if task.kind == "segmentation" else read_depth(example.label, scale=task.depth_unit)


@dataclass(frozen=True)
class Window:
    """A part of an input, in its pixels; may be mirrored."""

    top: int
    left: int
    height: int
    width: int
    mirrored: bool = False


def sample_labels(
    task: Task, truth: Tensor, window: Window, size: tuple[int, int], *, geometry: Geometry, source: tuple[int, int]
) -> Tensor:
    """Labels [H, W] of a picture at the centres of `size` cells over a window of what the model sees of it.

    Returns:
        int64 with `NOT_COUNTED`, or float with NaN, beyond the picture and where nothing is labelled.
    """
    rows, inside_rows = _places(
        window.top, window.height, size[0], geometry.input_size[0], geometry.resized[0], source[0]
    )
    cols, inside_cols = _places(
        window.left, window.width, size[1], geometry.input_size[1], geometry.resized[1], source[1]
    )
    taken = truth[rows][:, cols]
    inside = inside_rows[:, None] & inside_cols
    if task.kind == "segmentation":
        taken = taken.where(inside & (taken != task.ignore), torch.tensor(NOT_COUNTED))
    else:
        taken = taken.where(inside, torch.tensor(math.nan))
    return taken.flip(1) if window.mirrored else taken


def _places(start: int, length: int, count: int, kept: int, resized: int, source: int) -> tuple[Tensor, Tensor]:
    """Rows of the picture under `count` cell centres, and whether they lie in it."""
    centres = start + (torch.arange(count, dtype=torch.float64) + 0.5) * (length / count)
    places = (centres * (source / resized)).floor().long().clamp(0, source - 1)
    return places, (centres >= 0) & (centres < kept)
