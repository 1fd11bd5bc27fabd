"""`densedino adapt` and `densedino export` of what it made."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from densedino.cli.main import main

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore::densedino.errors.UntrainedWarning")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for sub in ("images", "masks"):
        (tmp_path / "data" / sub).mkdir(parents=True)
    for i in range(4):
        mask = np.zeros((48, 64), np.uint8)
        mask[:, 16 * i : 16 * i + 16] = 1
        mask[0] = 9
        Image.fromarray(np.stack([mask * 200, mask, mask], -1)).save(tmp_path / "data" / "images" / f"{i}.png")
        Image.fromarray(mask).save(tmp_path / "data" / "masks" / f"{i}.png")
    return tmp_path / "data"


def test_a_folder_of_masks_becomes_an_onnx_file(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    options = "--model debug_vit --weights random --ignore 9 --tune lora --rank 2 --steps 2 --batch-size 2"
    command = ["adapt", str(data), "-o", str(out), *options.split(), "--set", "fit.steps=4", "--set", "augment.crop=32"]
    assert main(command) == 0
    shown = capsys.readouterr()
    assert "mIoU" in shown.out and "frozen:" in shown.out and str(out) in shown.out
    assert "step 2 of 2" in shown.err
    values = json.loads((out / "adapter.json").read_text())["adapter"]
    assert values["tune"]["rank"] == 2 and values["task"]["classes"] == ["0", "1"]
    assert main(command) == 0  # done: says so again
    assert main(["export", str(out), "--to", "onnx", "-o", str(tmp_path / "a.onnx")]) == 0
    assert "labels, logits" in capsys.readouterr().out
    assert main(["export", str(out), "--to", "timm", "-o", str(tmp_path / "a.safetensors")]) == 2


def test_blocks_are_swept(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = "--model debug_vit --weights random --ignore 9 --sweep"
    assert main(["adapt", str(data), "-o", str(tmp_path / "s"), *options.split()]) == 0
    assert "tells most" in capsys.readouterr().out
    assert [row["layer"] for row in json.loads((tmp_path / "s" / "sweep.json").read_text())["blocks"]] == [0, 1]


def test_faults_end_with_one_line(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (data / "masks" / "2.png").unlink()
    assert main(["adapt", str(data), "-o", str(tmp_path / "o"), "--model", "debug_vit", "--weights", "random"]) == 2
    assert "2.png" in capsys.readouterr().err
