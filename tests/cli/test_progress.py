from __future__ import annotations

import re

import pytest

from densedino.cli.progress import progress


def test_lines_for_logs_name_what_is_counted(capsys, monkeypatch) -> None:
    monkeypatch.setattr("densedino.cli.progress._LINE_EVERY", 0.0)
    with progress("tiles") as (begin, advance):
        begin(4)
        advance(1)
    assert re.fullmatch(r"progress   1 of 4, \d+ s left, [\d.,]+ tiles/s\n", capsys.readouterr().err)


@pytest.mark.parametrize("total", [3, 0])
def test_a_bar_for_a_terminal(capsys, monkeypatch, total) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_INTERACTIVE", "1")
    with progress("tiles") as (begin, advance):
        begin(total)
        for _ in range(3):
            advance(1)
    err = capsys.readouterr().err
    assert "tiles/s" in err and ("3/3" in err if total else "3/?" in err)


def test_what_never_begins_shows_nothing(capsys) -> None:
    with progress("tiles"):
        pass
    assert capsys.readouterr().err == ""
