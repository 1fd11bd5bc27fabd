from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from densedino.cli.main import main

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def test_labels_of_pictures_and_pixels(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["text", str(photos / "chelsea.png"), "--model", "debug_vit-txt", "--weights", "random"]
    out = tmp_path / "out"
    assert main([*args, "--labels", "roof, tree, solar panel", "--prompts", "plain", "-o", str(out)]) == 0
    rows = (out / "classes.csv").read_text().splitlines()[1:]
    assert sorted(row.split(",")[2] for row in rows) == ["roof", "solar panel", "tree"]
    (labels,) = out.rglob("*.classes.png")
    with Image.open(labels) as image, Image.open(photos / "chelsea.png") as photo:
        assert image.size == photo.size and np.asarray(image).max() <= 2
    for wrong in (",", "a, a"):
        assert main([*args, "--labels", wrong]) == 2 and "--labels" in capsys.readouterr().err
