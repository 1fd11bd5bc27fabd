from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from densedino.cli.main import main

if TYPE_CHECKING:
    from pathlib import Path


def test_depth_in_16_bits_and_a_sheet(photos: Path, tmp_path: Path) -> None:
    photo, out = photos / "chelsea.png", tmp_path / "out"
    args = ["--model", "debug_vit-chm", "--weights", "random", "--resize", "64", "--flip", "-o", str(out)]
    assert main(["depth", str(photo), *args]) == 0
    (depth,), (record,) = out.rglob("*.depth.png"), out.rglob("*.png.json")
    with Image.open(depth) as image, Image.open(photo) as source:
        levels = np.asarray(image)
        assert image.size == source.size
    metres = json.loads(record.read_text())["metres"]
    assert levels.dtype == np.uint16 and np.allclose([levels.min() / 256, levels.max() / 256], metres, atol=1 / 256)
    assert len(list(out.rglob("*.sheet.png"))) == 1
