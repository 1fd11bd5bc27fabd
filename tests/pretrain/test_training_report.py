"""The report as files."""

from __future__ import annotations

import runpy
import sys
from typing import TYPE_CHECKING

import pytest
from PIL import Image

from densedino.errors import InputError
from densedino.pretrain import training_report
from densedino.pretrain.training_report import write_report

if TYPE_CHECKING:
    from pathlib import Path


def test_both_files_are_written_and_written_again(run_folder: Path) -> None:
    page = write_report(run_folder)
    assert page == run_folder / "report.html"
    with Image.open(run_folder / "report.png") as picture:
        picture.load()
    before = {path.name for path in run_folder.iterdir()}
    assert write_report(str(run_folder)) == page
    assert {path.name for path in run_folder.iterdir()} == before, "nothing is left behind"


def test_a_report_that_fails_leaves_the_old_one(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_report(run_folder)
    before = (run_folder / "report.html").read_bytes()

    def broken(*_: object) -> str:
        raise OSError("disk full")

    monkeypatch.setattr(training_report, "render_page", broken)
    with pytest.raises(OSError, match="disk full"):
        write_report(run_folder)
    assert (run_folder / "report.html").read_bytes() == before


def test_it_can_be_run_by_itself(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for args, status, text in (
        ([str(run_folder)], 0, "report.html"),
        ([str(tmp_path / "nowhere")], 1, "holds no run"),
        ([], 2, "usage"),
    ):
        monkeypatch.setattr(sys, "argv", ["training_report", *args])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(training_report.__file__, run_name="__main__")
        assert end.value.code == status
        out = capsys.readouterr()
        assert text in out.out + out.err


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no run"):
        write_report(tmp_path)
