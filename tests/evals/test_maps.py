"""Layouts of images with masks and depths, as they are on disk."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from densedino.errors import ImageError, InputError
from densedino.evals.datasets import read_labels
from densedino.evals.maps import find_depths, find_masks, read_depth

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def put(root: Path, path: str, values: np.ndarray) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(root / path)


PHOTO = np.full((8, 8, 3), 99, np.uint8)


def values(*numbers: int) -> np.ndarray:
    """A mask of these labels."""
    return np.resize(np.array(numbers, np.uint8), (8, 8))


def ade(root: Path) -> None:
    for folder in ("training", "validation"):
        put(root, f"images/{folder}/a.jpg", PHOTO)
        put(root, f"annotations/{folder}/a.png", values(0, 1, 150))


def voc(root: Path) -> None:
    for split, name in (("train", "a"), ("val", "b")):
        put(root, f"JPEGImages/{name}.jpg", PHOTO)
        image = Image.fromarray(values(0, 15, 255), mode="P")
        image.putpalette([0] * 768)
        (root / "SegmentationClass").mkdir(exist_ok=True)
        image.save(root / f"SegmentationClass/{name}.png")
        (root / "ImageSets/Segmentation").mkdir(parents=True, exist_ok=True)
        (root / f"ImageSets/Segmentation/{split}.txt").write_text(f"{name}\n")


def cityscapes(root: Path) -> None:
    for split in ("train", "val"):
        put(root, f"leftImg8bit/{split}/ulm/ulm_0_leftImg8bit.png", PHOTO)
        put(root, f"gtFine/{split}/ulm/ulm_0_gtFine_labelIds.png", values(7, 33, 3))


def coco(root: Path) -> None:
    for split in ("train2017", "val2017"):
        put(root, f"{split}/1.jpg", PHOTO)
        put(root, f"stuffthingmaps/{split}/1.png", values(0, 12, 181, 255))


def camvid(root: Path) -> None:
    for split in ("train", "val"):
        put(root, f"{split}/a.png", PHOTO)
        put(root, f"{split}annot/a.png", values(0, 10, 11))


def plain(root: Path) -> None:
    for split in ("train", "val"):
        put(root, f"images/{split}/deep/a.jpg", PHOTO)
        put(root, f"masks/{split}/deep/a.png", values(0, 4, 255))


@pytest.mark.parametrize(
    ("make", "layout", "classes", "void", "labels"),
    [
        (ade, "ADE20K", 150, 255, {255, 0, 149}),
        (voc, "VOC", 21, 255, {0, 15, 255}),
        (cityscapes, "Cityscapes", 19, 255, {0, 18, 255}),
        (coco, "COCO-Stuff", 171, 255, {0, 11, 170, 255}),
        (camvid, "CamVid", 11, 11, {0, 10, 11}),
        (plain, "images and masks", 5, 255, {0, 4, 255}),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_layouts(
    make: Callable[[Path], None], layout: str, classes: int, void: int, labels: set[int], tmp_path: Path
) -> None:
    make(tmp_path)
    data = find_masks(tmp_path)
    assert (data.layout, len(data.classes), data.ignore) == (layout, classes, void)
    assert len(data.train) == len(data.test) == 1
    assert set(np.unique(read_labels(data.test[0], data))) == labels


def test_masks_that_are_wrong(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no layout of images and masks"):
        find_masks(tmp_path)
    cityscapes(tmp_path)
    next((tmp_path / "gtFine/val/ulm").iterdir()).unlink()
    with pytest.raises(InputError, match=r"ulm_0_leftImg8bit\.png', whose mask should be .*gtFine_labelIds\.png"):
        find_masks(tmp_path)
    other = tmp_path / "other"
    put(other, "images/train/a.jpg", PHOTO)
    put(other, "masks/train/a.png", values(0))
    put(other, "images/val/a.jpg", PHOTO)
    put(other, "masks/val/a.png", values(0))
    with pytest.raises(InputError, match="one class only"):
        find_masks(other)


def test_depths_in_both_layouts(tmp_path: Path) -> None:
    for split in ("train", "test"):
        put(tmp_path, f"nyu/official_splits/{split}/kitchen/rgb_00001.jpg", PHOTO)
        put(tmp_path, f"nyu/official_splits/{split}/kitchen/sync_depth_00001.png", np.full((8, 8), 2500, np.uint16))
    data = find_depths(tmp_path / "nyu")
    assert data.layout == "NYUv2" and read_depth(data.test[0], data)[0, 0] == pytest.approx(2.5)
    for split in ("train", "val"):
        put(tmp_path, f"own/images/{split}/a.jpg", PHOTO)
        (tmp_path / f"own/depths/{split}").mkdir(parents=True)
        np.save(tmp_path / f"own/depths/{split}/a.npy", np.array([[1.5, np.nan]] * 2, np.float32))
    data = find_depths(tmp_path / "own")
    assert read_depth(data.test[0], data).tolist() == [[1.5, 0.0]] * 2
    np.save(tmp_path / "own/depths/val/a.npy", np.zeros((2, 2, 2)))
    with pytest.raises(ImageError, match=r"has shape \(2, 2, 2\)"):
        read_depth(data.test[0], data)
    (tmp_path / "own/depths/val/a.npy").unlink()
    with pytest.raises(InputError, match=r"1 of 1 test images have no depth map; the first is .*a\.jpg"):
        find_depths(tmp_path / "own")
