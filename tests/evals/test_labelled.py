"""Layouts of images with classes."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import pytest

from densedino.errors import InputError
from densedino.evals.labelled import find_labelled

if TYPE_CHECKING:
    from pathlib import Path


def test_folders_of_classes(class_folder: Path) -> None:
    data = find_labelled(class_folder)
    assert data.classes == ("class0", "class1", "class2") and len(data.train) == 18 and len(data.test) == 12
    assert [sample.label for sample in data.test] == [0] * 4 + [1] * 4 + [2] * 4


def test_imagenet_as_it_is_on_disk(class_folder: Path, tmp_path: Path) -> None:
    base = tmp_path / "ILSVRC/Data/CLS-LOC"
    shutil.copytree(class_folder / "train", base / "train")
    (base / "val").mkdir()
    lines = ["ImageId,PredictionString"]
    for i, number in enumerate((2, 0)):
        shutil.copy(class_folder / f"val/class{number}/0.png", base / f"val/v{i}.png")
        lines.append(f"v{i},class{number} 10 20 30 40 class{number} 1 2 3 4 ")
    (tmp_path / "LOC_val_solution.csv").write_text("\n".join(lines))
    data = find_labelled(tmp_path)
    assert data.layout == "ImageNet" and [sample.label for sample in data.test] == [2, 0]
    shutil.copy(class_folder / "val/class0/0.png", base / "val/unknown.png")
    with pytest.raises(InputError, match=r"unknown.png' has no known class"):
        find_labelled(tmp_path)


def test_geo_bench_by_its_json_tables(class_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for i in range(3):
        shutil.copy(class_folder / f"val/class{i}/0.png", tmp_path / f"images/s{i}.png")
    (tmp_path / "default_partition.json").write_text(json.dumps({"train": ["s0", "s1"], "test": ["s2"]}))
    (tmp_path / "label_map.json").write_text(json.dumps({"forest": ["s0", "s2"], "river": ["s1"]}))
    data = find_labelled(tmp_path)
    assert data.classes == ("forest", "river") and [sample.label for sample in (*data.train, *data.test)] == [0, 1, 0]
    (tmp_path / "images/s2.png").unlink()
    with pytest.raises(InputError, match=r"'s2' .* has no picture"):
        find_labelled(tmp_path)


def test_what_is_wrong_is_said(class_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no folder"):
        find_labelled(tmp_path / "none")
    with pytest.raises(InputError, match=r"no train/ and val/ folders"):
        find_labelled(tmp_path)
    shutil.copytree(class_folder, tmp_path / "data")
    shutil.move(tmp_path / "data/train/class2", tmp_path / "data/elsewhere")
    with pytest.raises(InputError, match=r"class2' is a class that is not in the training set"):
        find_labelled(tmp_path / "data")
    (tmp_path / "data/train/class2").mkdir()
    with pytest.raises(InputError, match=r"class2' has no images"):
        find_labelled(tmp_path / "data")
    shutil.rmtree(tmp_path / "data/train/class2")
    shutil.rmtree(tmp_path / "data/train/class1")
    with pytest.raises(InputError, match="1 class folders"):
        find_labelled(tmp_path / "data")
