from __future__ import annotations

from typing import TYPE_CHECKING

from densedino.cli.main import main

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def test_the_most_probable_classes(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["classify", str(photos / "chelsea.png"), "--model", "debug_vit-lc", "--weights", "random"]
    assert main([*args, "--top", "2", "--resize", "64x96", "-o", str(tmp_path / "out")]) == 0
    rows = (tmp_path / "out" / "classes.csv").read_text().splitlines()
    assert len(rows) == 3 and rows[1].split(",")[1] == "1"
    for wrong in (["--top", "0"], ["--resize", "64"]):
        assert main([*args, *wrong]) == 2
        assert wrong[0] in capsys.readouterr().err
