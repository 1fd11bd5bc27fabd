from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from densedino.cli import segment, segment_by_head
from densedino.cli.main import main

if TYPE_CHECKING:
    from pathlib import Path


def test_a_heads_name_is_told_from_a_backbones() -> None:
    assert segment.choose(["a.jpg", "--model", "vit7b16-ade20k-m2f"]) is segment_by_head.run
    assert segment.choose(["a.jpg", "--model=dinov3_vit7b16_ms"]) is segment_by_head.run
    assert segment.choose(["a.jpg", "--model", "vits16"]) is segment.run
    assert segment.choose(["vit7b16-ade20k-m2f"]) is segment.run


def test_classes_of_every_pixel(photos: Path, tmp_path: Path) -> None:
    photo, out = photos / "chelsea.png", tmp_path / "out"
    args = ["--model", "debug_vit-m2f", "--weights", "random", "--crop", "64", "--stride", "48", "-o", str(out)]
    assert main(["segment", str(photo), *args]) == 0
    (labels,) = out.rglob("*.classes.png")
    with Image.open(labels) as image, Image.open(photo) as source:
        assert image.mode == "P" and image.size == source.size and np.asarray(image).max() < 5
