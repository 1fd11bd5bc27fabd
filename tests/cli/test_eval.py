"""`densedino eval`: what it refuses; whole runs are in tests/evals/test_run.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

from densedino.cli.main import main

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def test_what_is_missing_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval"]) == 2
    assert "give a protocol and its data" in capsys.readouterr().err
    assert main(["eval", "--reproduce", str(tmp_path)]) == 2
    assert "holds no finished evaluation" in capsys.readouterr().err
    assert main(["eval", "knn", "--data", str(tmp_path / "none"), "-o", str(tmp_path / "run")]) == 2
    assert "no folder" in capsys.readouterr().err
    assert main(["eval", "knn", "--data", str(tmp_path), "--set", "neighbours=3"]) == 2
    assert "unknown" in capsys.readouterr().err
