from __future__ import annotations

import json
from typing import TYPE_CHECKING

from densedino.cli.main import main

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def test_coco_and_a_sheet(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["detect", str(photos / "chelsea.png"), "--model", "debug_vit-detr", "--weights", "random"]
    assert main([*args, "--threshold", "0", "--resize", "96x128", "-o", str(tmp_path / "out")]) == 0
    coco = json.loads((tmp_path / "out" / "coco.json").read_text())
    assert len(coco["images"]) == 1 and len(coco["annotations"]) == 20
    assert {one["category_id"] for one in coco["annotations"]} <= {one["id"] for one in coco["categories"]}
    assert len(list((tmp_path / "out").rglob("*.sheet.png"))) == 1
    assert main([*args, "--threshold", "3"]) == 2 and "between 0 and 1" in capsys.readouterr().err
