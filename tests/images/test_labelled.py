"""Layouts of labelled folders, and the subsets taken of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from PIL import Image

from densedino.errors import ImageError, InputError
from densedino.images.labelled import (
    evenly,
    read_class_folder,
    read_depth,
    read_depth_folder,
    read_mask,
    read_mask_folder,
)

if TYPE_CHECKING:
    from pathlib import Path


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


@pytest.mark.parametrize(("count", "wanted"), [(10, 3), (3, 10), (0, 4), (1, 1), (1000, 7)])
def test_evenly_takes_different_places_in_order(count: int, wanted: int) -> None:
    places = evenly(count, wanted)
    assert len(places) == min(count, wanted)
    assert places == sorted(set(places))
    assert all(0 <= p < count for p in places)
    if len(places) > 1:
        gaps = np.diff(places)
        assert gaps.max() - gaps.min() <= 1


def test_classes_in_train_and_val(tmp_path: Path) -> None:
    touch(
        tmp_path,
        *(f"train/{c}/{i}.jpg" for c in "ab" for i in range(6)),
        *(f"val/{c}/{i}.png" for c in "ab" for i in "12"),
    )
    touch(tmp_path, "train/a/readme.txt", "train/.hidden/1.jpg")
    found = read_class_folder(tmp_path)
    assert found.classes == ("a", "b")
    bank, queries = found.take(bank=3, queries=9)
    assert [(p.parent.name, label) for p, label in bank] == [("a", 0)] * 3 + [("b", 1)] * 3
    assert [p.parent.parent.name for p, _ in queries] == ["val"] * 4


def test_classes_without_a_split_are_split_and_share_nothing(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{c}/{i}.jpg" for c in ("cat", "dog", "elk") for i in range(8)))
    found = read_class_folder(tmp_path)
    assert [len(paths) for paths in found.bank] == [6, 6, 6]
    assert [len(paths) for paths in found.queries] == [2, 2, 2]
    assert not {p for paths in found.bank for p in paths} & {p for paths in found.queries for p in paths}


def test_class_folders_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no folder"):
        read_class_folder(tmp_path / "nowhere")
    touch(tmp_path, "only/1.jpg", "only/2.jpg")
    with pytest.raises(InputError, match="at least two classes"):
        read_class_folder(tmp_path)
    touch(tmp_path, "train/a/1.jpg", "train/b/1.jpg", "val/c/1.jpg")
    with pytest.raises(InputError, match="classes that train/ has not: c"):
        read_class_folder(tmp_path)


@pytest.mark.parametrize(
    "layout",
    [
        ("train", "trainannot", "val", "valannot"),
        ("train/images", "train/masks", "val/images", "val/masks"),
        ("images/train", "masks/train", "images/val", "masks/val"),
    ],
)
def test_masks_in_every_layout(tmp_path: Path, layout: tuple[str, ...]) -> None:
    for name, suffix in zip(layout, ("jpg", "png", "jpg", "png"), strict=True):
        touch(tmp_path, *(f"{name}/{i}.{suffix}" for i in range(5)))
    found = read_mask_folder(tmp_path)
    assert [(p.stem, m.stem) for p, m in found.train] == [(str(i), str(i)) for i in range(5)]
    train, val = found.take(train=2, val=50)
    assert (len(train), len(val)) == (2, 5)
    assert {m.suffix for _, m in train + val} == {".png"}


@pytest.mark.parametrize("name", ["masks", "labels", "annotations"])
def test_masks_without_a_split_are_split(tmp_path: Path, name: str) -> None:
    touch(tmp_path, *(f"images/{i}.jpg" for i in range(8)), *(f"{name}/{i}.png" for i in range(8)))
    found = read_mask_folder(tmp_path)
    assert (len(found.train), len(found.val)) == (6, 2)
    assert not set(found.train) & set(found.val)


def test_mask_folders_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none of the layouts.*trainannot"):
        read_mask_folder(tmp_path)
    touch(tmp_path, "images/1.jpg", "images/2.jpg", "masks/1.png")
    with pytest.raises(InputError, match=r"1 images have no mask in .*masks', the first is '2.jpg'"):
        read_mask_folder(tmp_path)


def test_a_mask_is_read_as_numbers_and_a_palette_as_its_indices(tmp_path: Path) -> None:
    labels = np.arange(12, dtype=np.uint8).reshape(3, 4)
    Image.fromarray(labels).save(tmp_path / "grey.png")
    indexed = Image.fromarray(labels, mode=None).convert("P")
    indexed.putdata(labels.flatten().tolist())
    indexed.putpalette([200, 10, 20] * 256)
    indexed.save(tmp_path / "palette.png")
    Image.fromarray(labels.astype(np.uint16) * 300).save(tmp_path / "deep.png")
    expected = torch.arange(12).view(3, 4)
    assert torch.equal(read_mask(tmp_path / "grey.png"), expected)
    assert torch.equal(read_mask(tmp_path / "palette.png"), expected)
    assert torch.equal(read_mask(tmp_path / "deep.png"), expected * 300)


def test_a_mask_in_colours_or_no_file_is_refused(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "colours.png")
    with pytest.raises(ImageError, match="has 3 channels"):
        read_mask(tmp_path / "colours.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(ImageError, match="cannot be read"):
        read_mask(tmp_path / "broken.png")


def test_depth_maps_are_paired_and_scaled(tmp_path: Path) -> None:
    touch(tmp_path, *(f"images/{i}.jpg" for i in range(4)))
    (tmp_path / "depth").mkdir()
    for i in range(3):
        np.save(tmp_path / "depth" / f"{i}.npy", np.full((2, 3), i, np.float32))
    Image.fromarray(np.full((2, 3), 2500, np.uint16)).save(tmp_path / "depth" / "3.png")
    folder = read_depth_folder(tmp_path)
    assert [p[1].name for p in folder.train] == ["0.npy", "1.npy", "2.npy"]
    assert torch.equal(read_depth(folder.val[0][1], scale=0.001), torch.full((2, 3), 2.5))
    (tmp_path / "depth" / "1.npy").unlink()
    with pytest.raises(InputError, match=r"1 images have no depth map.*1\.jpg"):
        read_depth_folder(tmp_path)


@pytest.mark.parametrize("bad", [np.zeros((2, 2, 3)), np.full((2, 2), -1.0), np.array([["a"]])])
def test_a_depth_map_that_is_none_is_named(bad: np.ndarray, tmp_path: Path) -> None:
    np.save(tmp_path / "bad.npy", bad)
    with pytest.raises(ImageError, match=r"bad\.npy"):
        read_depth(tmp_path / "bad.npy")
