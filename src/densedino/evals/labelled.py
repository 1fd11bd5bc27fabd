"""Owns the layouts of images with classes: a folder per class, ImageNet as it is on disk, and GEO-Bench."""

from __future__ import annotations

import csv
import json
from typing import TYPE_CHECKING

from densedino.errors import InputError
from densedino.evals.datasets import Dataset, Sample, sample_of
from densedino.images.containers import IMAGE_SUFFIXES

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["find_images", "find_labelled", "split_folder"]

_NAMES = {"train": ("train", "training", "trn"), "test": ("val", "validation", "valid", "test", "testing")}


def split_folder(root: Path, split: str, *, suffix: str = "") -> Path | None:
    """The folder of a split, by the names that are in use ("train", "training"; "val", "validation", "test")."""
    return next((root / (name + suffix) for name in _NAMES[split] if (root / (name + suffix)).is_dir()), None)


def find_images(folder: Path) -> list[Path]:
    """All pictures below a folder, sorted."""
    found = (path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    return sorted(path for path in found if not path.name.startswith("."))


def find_labelled(root: Path) -> Dataset:
    """Images with one class each.

    `train/CLASS/…` and `val/CLASS/…`; ImageNet's `ILSVRC/Data/CLS-LOC/train/CLASS/…` with a flat `val/` and
    `LOC_val_solution.csv`; a GEO-Bench task's folder.

    Raises:
        InputError: none of these, a class without images, or fewer than two classes.
    """
    if not root.is_dir():
        raise InputError(f"no folder {str(root)!r}.")
    if (root / "default_partition.json").is_file():
        return _geo_bench(root)
    base = root / "ILSVRC" / "Data" / "CLS-LOC" if (root / "ILSVRC").is_dir() else root
    train, test = (split_folder(base, split) for split in ("train", "test"))
    if train is None or test is None:
        raise InputError(
            f"{str(root)!r} has no train/ and val/ folders with a folder per class: train/CAT/1.jpg, val/CAT/2.jpg. "
            f"It has: {', '.join(sorted(p.name for p in root.iterdir())[:8]) or 'nothing'}."
        )
    classes = sorted(path.name for path in train.iterdir() if path.is_dir() and not path.name.startswith("."))
    if len(classes) < 2:
        raise InputError(f"{str(train)!r} has {len(classes)} class folders ({', '.join(classes)}); at least two.")
    number = {name: i for i, name in enumerate(classes)}
    flat = _solutions(root)
    return Dataset(
        root=root,
        layout="ImageNet" if flat else "class folders",
        kind="labels",
        classes=tuple(classes),
        train=tuple(_classes_of(root, train, number)),
        test=tuple(_flat(root, test, flat, number) if flat else _classes_of(root, test, number)),
    )


def _classes_of(root: Path, folder: Path, number: dict[str, int]) -> list[Sample]:
    samples: list[Sample] = []
    for inner in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
        if inner.name not in number:
            raise InputError(f"{str(inner)!r} is a class that is not in the training set. Add it there, or remove it.")
        images = find_images(inner)
        if not images:
            raise InputError(f"the class folder {str(inner)!r} has no images.")
        samples += [sample_of(root, image, label=number[inner.name]) for image in images]
    if not samples:
        raise InputError(f"{str(folder)!r} has no class folders. Wanted: {folder.name}/CLASS/image.jpg.")
    return samples


def _solutions(root: Path) -> dict[str, str]:
    """ImageNet's `LOC_val_solution.csv`: class of each image of the flat validation folder; empty without it."""
    path = root / "LOC_val_solution.csv"
    if not path.is_file():
        return {}
    with path.open(encoding="utf-8", newline="") as file:
        return {row["ImageId"]: row["PredictionString"].split()[0] for row in csv.DictReader(file)}


def _flat(root: Path, folder: Path, solutions: dict[str, str], number: dict[str, int]) -> list[Sample]:
    samples = []
    for image in find_images(folder):
        if solutions.get(image.stem) not in number:
            raise InputError(f"{str(image)!r} has no known class in LOC_val_solution.csv.")
        samples.append(sample_of(root, image, label=number[solutions[image.stem]]))
    return samples


def _geo_bench(root: Path) -> Dataset:
    """A classification task of GEO-Bench 1.0 whose bands were written as images beside its two JSON tables.

    Its own samples are HDF5 files whose labels are pickles; nothing is unpickled here, so the class must come from
    `label_map.json` (class name to sample names), which the benchmark ships, and pictures from `images/NAME.*`.
    """
    tables = {}
    for name in ("default_partition.json", "label_map.json"):
        if not (root / name).is_file():
            raise InputError(f"{str(root)!r} looks like GEO-Bench, but has no {name}.")
        tables[name] = json.loads((root / name).read_text(encoding="utf-8"))
    partition, label_map = tables["default_partition.json"], tables["label_map.json"]
    classes = sorted(label_map)
    class_of = {name: classes.index(label) for label, names in label_map.items() for name in names}
    images = {image.stem: image for image in find_images(root / "images")} if (root / "images").is_dir() else {}

    def of(split: str) -> tuple[Sample, ...]:
        samples = []
        for name in partition.get(split, []):
            if name not in images or name not in class_of:
                missing = "picture images/" + name if name not in images else "class in label_map.json"
                raise InputError(f"GEO-Bench sample {name!r} in {str(root)!r} has no {missing}.")
            samples.append(sample_of(root, images[name], label=class_of[name]))
        return tuple(samples)

    return Dataset(
        root=root, layout="GEO-Bench", kind="labels", classes=tuple(classes), train=of("train"), test=of("test")
    )
