"""Owns the layouts of images with a value per pixel: masks of classes (CamVid, ADE20K, VOC, …) and depths (NYUv2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from densedino.errors import ImageError, InputError
from densedino.evals.datasets import Dataset, Sample, sample_of
from densedino.evals.labelled import find_images, split_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

__all__ = ["find_depths", "find_masks", "read_depth"]

VOID = 255
"""The label that means void, unless a layout has another."""

_CAMVID = ["sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "cyclist"]
_VOC = [
    "background",
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
]
_CITYSCAPES = {
    7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole", 19: "traffic light",
    20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky", 24: "person", 25: "rider", 26: "car", 27: "truck",
    28: "bus", 31: "train", 32: "motorcycle", 33: "bicycle",
}  # fmt: skip
_COCO_UNUSED = {11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90}
"""Of the 182 numbers of COCO-Stuff's pixel maps, those that no class has."""


def find_masks(root: Path) -> Dataset:
    """Images with a mask of class numbers each: ADE20K, VOC, Cityscapes, COCO-Stuff, CamVid, or any folder.

    Any folder: `images/train/…` with masks of the same names as PNG in `masks/train/…` (or `labels`, `annotations`),
    and likewise `val`. Void is 255. Names of classes stand in `classes.txt`, a line each; else they are the numbers up
    to the largest one in the training masks.

    Raises:
        InputError: no such layout, an image without its mask, no images, or a single class.
    """
    if not root.is_dir():
        raise InputError(f"no folder {str(root)!r}.")
    readers: dict[str, Callable[[Path], Dataset]] = {
        "SegmentationClass": _voc,
        "leftImg8bit": _cityscapes,
        "stuffthingmaps": _coco_stuff,
        "trainannot": _camvid,
    }
    reader = next((reader for folder, reader in readers.items() if (root / folder).is_dir()), _plain)
    if (root / "annotations" / "training").is_dir() and (root / "images" / "training").is_dir():
        reader = _ade20k
    data = reader(root)
    for split, samples in (("training", data.train), ("test", data.test)):
        if not samples:
            raise InputError(f"{str(root)!r} ({data.layout}) has no {split} images.")
    if len(data.classes) < 2:
        raise InputError(f"{str(root)!r} has one class only ({', '.join(data.classes)}): there is nothing to tell.")
    return data


def _masked(root: Path, images: Sequence[Path], mask_of: Callable[[Path], Path]) -> tuple[Sample, ...]:
    pairs = [(image, mask_of(image)) for image in images]
    missing = [(image, mask) for image, mask in pairs if not mask.is_file()]
    if missing:
        raise InputError(
            f"{len(missing)} of {len(pairs)} images have no mask; the first is {str(missing[0][0])!r}, whose mask "
            f"should be {str(missing[0][1])!r}. Add masks, or take these images out."
        )
    return tuple(sample_of(root, image, target=mask) for image, mask in pairs)


def _masks(
    root: Path,
    layout: str,
    splits: dict[str, tuple[Sample, ...]],
    *,
    classes: Sequence[str],
    ignore: int = VOID,
    remap: Sequence[int] = (),
) -> Dataset:
    return Dataset(
        root=root,
        layout=layout,
        kind="masks",
        classes=tuple(classes),
        ignore=ignore,
        remap=tuple(remap),
        train=splits["train"],
        test=splits["test"],
    )


def _camvid(root: Path) -> Dataset:
    """SegNet's CamVid: 11 classes, 11 is void. With a classes.txt, any folder that is laid out like it."""
    splits = {}
    for split in ("train", "test"):
        images, masks = split_folder(root, split), split_folder(root, split, suffix="annot")
        if images is None or masks is None:
            raise InputError(f"{str(root)!r} has no {split} images or masks: train/, trainannot/, val/, valannot/.")
        splits[split] = _masked(root, find_images(images), lambda i, a=images, m=masks: _same_name(i, a, m))  # type: ignore[misc]
    named = _named_classes(root)
    if named:
        return _masks(root, "images and masks", splits, classes=named)
    return _masks(root, "CamVid", splits, classes=_CAMVID, ignore=11)


def _same_name(image: Path, images: Path, masks: Path) -> Path:
    return (masks / image.relative_to(images)).with_suffix(".png")


def _plain(root: Path) -> Dataset:
    folder = next((root / name for name in ("masks", "labels", "annotations") if (root / name).is_dir()), None)
    if folder is None or not (root / "images").is_dir():
        raise InputError(
            f"{str(root)!r} is no layout of images and masks that is known. Lay it out as images/train/a.jpg, "
            "masks/train/a.png, images/val/…, masks/val/… (8-bit class numbers, 255 void). "
            f"It has: {', '.join(sorted(p.name for p in root.iterdir())[:8]) or 'nothing'}."
        )
    splits = {}
    for split in ("train", "test"):
        images, masks = split_folder(root / "images", split), split_folder(folder, split)
        if images is None or masks is None:
            raise InputError(f"{str(root)!r} has no {split} split in both images/ and {folder.name}/.")
        splits[split] = _masked(root, find_images(images), lambda i, a=images, m=masks: _same_name(i, a, m))  # type: ignore[misc]
    return _masks(root, "images and masks", splits, classes=_named_classes(root) or _numbered(splits["train"]))


def _named_classes(root: Path) -> list[str]:
    path = root / "classes.txt"
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []


def _numbered(samples: Sequence[Sample]) -> list[str]:
    """Numbers up to the largest label in the masks."""
    highest = 0
    for sample in samples:
        with Image.open(str(sample.target)) as image:
            labels = np.array(image)
        highest = max(highest, int(labels[labels != VOID].max(initial=0)))
    return [str(number) for number in range(highest + 1)]


def _ade20k(root: Path) -> Dataset:
    """SceneParsing's 150 classes, stored as 1 to 150; 0 is what belongs to none."""
    splits = {}
    for split, folder in (("train", "training"), ("test", "validation")):
        images, masks = root / "images" / folder, root / "annotations" / folder
        splits[split] = _masked(root, find_images(images), lambda i, a=images, m=masks: _same_name(i, a, m))  # type: ignore[misc]
    path = root / "objectInfo150.txt"
    lines = path.read_text(encoding="utf-8").splitlines()[1:] if path.is_file() else []
    names = [line.split("\t")[-1].split(",")[0].strip() for line in lines] or [str(n) for n in range(1, 151)]
    return _masks(root, "ADE20K", splits, classes=names, remap=(VOID, *range(150)))


def _voc(root: Path) -> Dataset:
    """Pascal VOC: the lists of ImageSets/Segmentation, 21 classes, 255 at the borders of objects."""
    splits = {}
    for split, name in (("train", "train"), ("test", "val")):
        listed = root / "ImageSets" / "Segmentation" / f"{name}.txt"
        if not listed.is_file():
            raise InputError(f"{str(root)!r} has SegmentationClass/, as VOC has, but no {listed.relative_to(root)}.")
        images = [
            root / "JPEGImages" / f"{line.strip()}.jpg" for line in listed.read_text().split("\n") if line.strip()
        ]
        splits[split] = _masked(root, images, lambda image: root / "SegmentationClass" / f"{image.stem}.png")
    return _masks(root, "VOC", splits, classes=_VOC)


def _cityscapes(root: Path) -> Dataset:
    """The fine annotations, 34 label numbers to 19 classes."""
    splits = {}
    for split, name in (("train", "train"), ("test", "val")):
        folder = root / "leftImg8bit" / name

        def mask_of(image: Path, name: str = name) -> Path:
            stem = image.name.removesuffix("_leftImg8bit.png")
            return root / "gtFine" / name / image.parent.name / f"{stem}_gtFine_labelIds.png"

        splits[split] = _masked(root, find_images(folder), mask_of)
    table = [VOID] * 256
    for number, label in enumerate(_CITYSCAPES):
        table[label] = number
    return _masks(root, "Cityscapes", splits, classes=list(_CITYSCAPES.values()), remap=table)


def _coco_stuff(root: Path) -> Dataset:
    """The 171 classes of COCO-Stuff 164k, of the numbers 0 to 181 in its pixel maps."""
    splits = {}
    for split, name in (("train", "train2017"), ("test", "val2017")):
        images = root / name if (root / name).is_dir() else root / "images" / name
        masks = root / "stuffthingmaps" / name
        splits[split] = _masked(root, find_images(images), lambda i, a=images, m=masks: _same_name(i, a, m))  # type: ignore[misc]
    used = [number for number in range(182) if number not in _COCO_UNUSED]
    table = [VOID] * 256
    for place, number in enumerate(used):
        table[number] = place
    return _masks(root, "COCO-Stuff", splits, classes=[str(number) for number in used], remap=table)


def find_depths(root: Path) -> Dataset:
    """Images with a depth map each.

    NYUv2 as it is used for depth: `official_splits/{train,test}/SCENE/rgb_….jpg` with `sync_depth_….png` in
    millimetres; or `images/{train,val}/…` with `depths/{train,val}/…` as `.npy` in metres or 16-bit PNG in
    millimetres.

    Raises:
        InputError: no such layout, or an image without its depth.
    """
    nyu = next(
        (p for p in (root / "official_splits", root / "nyu_depth_v2" / "official_splits", root) if _is_nyu(p)), None
    )
    splits = {}
    for split in ("train", "test"):
        if nyu is not None:
            images = sorted(nyu.glob(f"{split}/*/rgb_*"))
            pairs = [(i, i.with_name(i.stem.replace("rgb_", "sync_depth_") + ".png")) for i in images]
        else:
            images_in, depths_in = split_folder(root / "images", split), split_folder(root / "depths", split)
            if images_in is None or depths_in is None:
                raise InputError(
                    f"{str(root)!r} is no layout of images and depths that is known. Lay it out as "
                    "images/train/a.jpg, depths/train/a.npy (metres) or a.png (millimetres), and likewise val."
                )
            pairs = []
            for image in find_images(images_in):
                stem = (depths_in / image.relative_to(images_in)).with_suffix("")
                pairs.append((image, next((p for s in (".npy", ".png") if (p := stem.with_suffix(s)).is_file()), stem)))
        missing = [image for image, depth in pairs if not depth.is_file()]
        if missing or not pairs:
            first = f"; the first is {str(missing[0])!r}" if missing else ""
            raise InputError(f"{str(root)!r}: {len(missing)} of {len(pairs)} {split} images have no depth map{first}.")
        splits[split] = tuple(sample_of(root, image, target=depth) for image, depth in pairs)
    return Dataset(
        root=root,
        layout="NYUv2" if nyu is not None else "images and depths",
        kind="depth",
        train=splits["train"],
        test=splits["test"],
        depth_scale=0.001,
    )


def _is_nyu(folder: Path) -> bool:
    return any(folder.glob("test/*/sync_depth_*.png"))


def read_depth(sample: Sample, data: Dataset) -> NDArray[np.float64]:
    """Depths [H, W] in metres; 0 where there is none.

    Raises:
        ImageError: a file that holds none.
    """
    path = sample.target
    try:
        if path is not None and path.suffix == ".npy":
            depth = np.load(path, allow_pickle=False).astype(np.float64)
        else:
            with Image.open(str(path)) as image:
                depth = np.array(image).astype(np.float64) * data.depth_scale
    except (OSError, ValueError) as error:
        raise ImageError(f"the depth map {str(path)!r} cannot be read ({error}).") from error
    if depth.ndim != 2:
        raise ImageError(f"the depth map {str(path)!r} has shape {depth.shape}; it must be [H, W].")
    return np.nan_to_num(depth, nan=0.0, posinf=0.0, neginf=0.0)
