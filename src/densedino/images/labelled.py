"""Owns labelled folders: their layouts, the masks in them, and the counted subset that a probe takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from densedino.errors import ImageError, InputError
from densedino.images.containers import IMAGE_SUFFIXES

if TYPE_CHECKING:
    from pathlib import Path

__all__ = [
    "ClassFolder",
    "MaskFolder",
    "evenly",
    "read_class_folder",
    "read_depth",
    "read_depth_folder",
    "read_mask",
    "read_mask_folder",
]

HELD_OUT = 4
"""Where a folder has no split of its own, every fourth image is held out."""

_LAYOUTS = (
    ("train", "trainannot", "val", "valannot"),
    ("train/images", "train/masks", "val/images", "val/masks"),
    ("images/train", "masks/train", "images/val", "masks/val"),
)
_UNSPLIT = (("images", "masks"), ("images", "labels"), ("images", "annotations"))
_DEPTHS = (
    ("train", "traindepth", "val", "valdepth"),
    ("train/images", "train/depth", "val/images", "val/depth"),
    ("images/train", "depth/train", "images/val", "depth/val"),
)
_UNSPLIT_DEPTHS = (("images", "depth"), ("images", "depths"))
DEPTH_SUFFIXES = frozenset({".npy", ".png", ".tif", ".tiff"})


def evenly(count: int, wanted: int) -> list[int]:
    """`wanted` places (at most all) spread evenly over `count`: the subset that needs no random numbers."""
    taken = min(count, wanted)
    return [(2 * i + 1) * count // (2 * taken) for i in range(taken)]


@dataclass(frozen=True, kw_only=True)
class ClassFolder:
    """Images in folders of classes, for a nearest-neighbour vote."""

    classes: tuple[str, ...]
    bank: tuple[tuple[Path, ...], ...]
    """By class: images whose labels are known to the vote."""
    queries: tuple[tuple[Path, ...], ...]
    """By class: images that are asked about; none of the bank."""

    def take(self, *, bank: int, queries: int) -> tuple[list[tuple[Path, int]], list[tuple[Path, int]]]:
        """At most so many images of each class, spread evenly over its names: (path, class) of bank and queries."""

        def some(groups: tuple[tuple[Path, ...], ...], wanted: int) -> list[tuple[Path, int]]:
            return [(paths[i], label) for label, paths in enumerate(groups) for i in evenly(len(paths), wanted)]

        return some(self.bank, bank), some(self.queries, queries)


def read_class_folder(folder: Path) -> ClassFolder:
    """Find the images of `folder`: folders of classes in `train/` and `val/`, or folders of classes (then split here).

    Raises:
        InputError: there is no such folder, fewer than two classes, or a class of `val/` that `train/` lacks.
    """
    if not folder.is_dir():
        raise InputError(f"no folder {str(folder)!r}. A k-NN probe needs one folder of images for each class.")
    if (folder / "train").is_dir() and (folder / "val").is_dir():
        bank, queries = _classes(folder / "train"), _classes(folder / "val")
        unknown = sorted(set(queries) - set(bank))
        if unknown:
            raise InputError(f"{str(folder / 'val')!r} has classes that train/ has not: {', '.join(unknown)}.")
    else:
        found = _classes(folder)
        bank = {name: [p for i, p in enumerate(paths) if i % HELD_OUT != HELD_OUT - 1] for name, paths in found.items()}
        queries = {name: paths[HELD_OUT - 1 :: HELD_OUT] for name, paths in found.items()}
    if len(bank) < 2 or not any(queries.values()):
        raise InputError(
            f"{str(folder)!r} holds {len(bank)} folders with images; a k-NN probe needs at least two classes, each a "
            f"folder of {HELD_OUT} images or more, maybe within train/ and val/."
        )
    return ClassFolder(
        classes=tuple(bank),
        bank=tuple(tuple(paths) for paths in bank.values()),
        queries=tuple(tuple(queries.get(name, ())) for name in bank),
    )


def _classes(folder: Path) -> dict[str, list[Path]]:
    found = {sub.name: _images(sub) for sub in sorted(folder.iterdir()) if sub.is_dir() and sub.name[0] != "."}
    return {name: paths for name, paths in found.items() if paths}


def _images(folder: Path, suffixes: frozenset[str] = IMAGE_SUFFIXES) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in suffixes and p.name[0] != ".")


@dataclass(frozen=True, kw_only=True)
class MaskFolder:
    """Images with a map of labels, or of depths, each."""

    train: tuple[tuple[Path, Path], ...]
    """(image, mask or depth map)."""
    val: tuple[tuple[Path, Path], ...]

    def take(self, *, train: int, val: int) -> tuple[list[tuple[Path, Path]], list[tuple[Path, Path]]]:
        """At most so many pairs of each, spread evenly over the names."""
        return [self.train[i] for i in evenly(len(self.train), train)], [
            self.val[i] for i in evenly(len(self.val), val)
        ]


def read_mask_folder(folder: Path) -> MaskFolder:
    """Find pairs of image and mask (same name, any suffix) in one of these layouts.

    `train trainannot val valannot` (CamVid's), `train/images train/masks val/images val/masks`, `images/train
    masks/train images/val masks/val`; or `images` and `masks`, `labels` or `annotations` (then split here).

    Raises:
        InputError: the folder has none of these, or an image has no mask.
    """
    return _pair_folder(folder, _LAYOUTS, _UNSPLIT, IMAGE_SUFFIXES, what="mask", written="as PNG or TIFF")


def read_depth_folder(folder: Path) -> MaskFolder:
    """Find pairs of image and depth map (same name) in one of these layouts; for the maps see `read_depth`.

    `train traindepth val valdepth`, `train/images train/depth val/images val/depth`, `images/train depth/train
    images/val depth/val`; or `images` and `depth` or `depths` (then split here).

    Raises:
        InputError: the folder has none of these, or an image has no depth map.
    """
    written = "as NumPy's .npy, or PNG or TIFF"
    return _pair_folder(folder, _DEPTHS, _UNSPLIT_DEPTHS, DEPTH_SUFFIXES, what="depth map", written=written)


def _pair_folder(
    folder: Path,
    layouts: tuple[tuple[str, str, str, str], ...],
    unsplit: tuple[tuple[str, str], ...],
    suffixes: frozenset[str],
    *,
    what: str,
    written: str,
) -> MaskFolder:
    def pairs(images: Path, maps: Path) -> tuple[tuple[Path, Path], ...]:
        by_name = {p.relative_to(maps).with_suffix(""): p for p in _images(maps, suffixes)}
        found = [(p, by_name.get(p.relative_to(images).with_suffix(""))) for p in _images(images)]
        missing = [p.name for p, pair in found if pair is None]
        if missing or not found:
            problem = f"no images in {str(images)!r}"
            if missing:
                problem = f"{len(missing)} images have no {what} in {str(maps)!r}, the first is {missing[0]!r}"
            raise InputError(f"{problem}. A {what} has the name of its image, {written}.")
        return tuple((p, pair) for p, pair in found if pair is not None)

    for layout in layouts:
        parts = [folder / name for name in layout]
        if all(part.is_dir() for part in parts):
            return MaskFolder(train=pairs(parts[0], parts[1]), val=pairs(parts[2], parts[3]))
    for names in unsplit:
        parts = [folder / name for name in names]
        if all(part.is_dir() for part in parts):
            both = pairs(parts[0], parts[1])
            train = tuple(pair for i, pair in enumerate(both) if i % HELD_OUT != HELD_OUT - 1)
            return MaskFolder(train=train, val=both[HELD_OUT - 1 :: HELD_OUT])
    valid = "; ".join(" ".join(names) for names in (*layouts, *unsplit))
    raise InputError(f"{str(folder)!r} has none of the layouts of images with {what}s. Valid subfolders: {valid}.")


def read_mask(path: Path) -> Tensor:
    """The labels of a mask file, as they are (a palette's indices, not its colours): int64 [H, W].

    Raises:
        ImageError: it cannot be read, or has several channels.
    """
    try:
        with Image.open(path) as image:
            labels = np.asarray(image)
    except OSError as error:
        raise ImageError(f"mask {str(path)!r} cannot be read ({error}).") from error
    if labels.ndim != 2:
        raise ImageError(
            f"mask {str(path)!r} has {labels.shape[2]} channels. A mask has one, with the number of the class in each "
            "pixel; colours are to be mapped to numbers first."
        )
    return torch.from_numpy(labels.astype(np.int64))


def read_depth(path: Path, *, scale: float = 1.0) -> Tensor:
    """The depths of a file [H, W], times `scale`: float32 in metres; 0 and NaN where nothing was measured.

    Raises:
        ImageError: it cannot be read, has several channels, or depths below 0.
    """
    try:
        if path.suffix.lower() == ".npy":
            depth = np.load(path, allow_pickle=False)
        else:
            with Image.open(path) as image:
                depth = np.asarray(image)
    except (OSError, ValueError) as error:
        raise ImageError(f"depth map {str(path)!r} cannot be read ({error}).") from error
    if depth.ndim != 2 or depth.dtype.kind not in "uif":
        raise ImageError(
            f"depth map {str(path)!r} is {depth.dtype} of shape {depth.shape}; it must be [H, W] of numbers, one depth "
            "for each pixel."
        )
    metres = torch.from_numpy(depth.astype(np.float32)) * scale
    if bool((metres < 0).any()):
        raise ImageError(
            f"depth map {str(path)!r} goes down to {float(metres.nan_to_num().min()):g}; depths are above 0, and 0 or "
            "NaN where nothing was measured."
        )
    return metres
