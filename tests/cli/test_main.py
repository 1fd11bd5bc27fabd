from __future__ import annotations

import subprocess
import sys

import pytest

import densedino
from densedino.cli.main import VERBS, main


def test_the_verbs_are_these() -> None:
    """A frozen list: a new verb is a decision, and DESIGN.md names it."""
    found = ["search", "select", "classify", "depth", "detect", "text", "segment", "change"]
    train, run = ["pretrain", "distill"], ["plan", "export", "quantize", "prune", "fidelity", "eval", "serve"]
    assert list(VERBS) == ["extract", "adapt", "view", *found, *train, *run, "models", "weights", "doctor"]


@pytest.mark.parametrize("args", [[], ["--help"], ["-h"]])
def test_help_lists_every_verb(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(args) == 0
    out = capsys.readouterr().out
    assert all(f"  {verb}" in out for verb in VERBS)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"densedino {densedino.__version__}\n"


def test_a_misspelt_verb_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["extrakt"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("densedino: error: unknown verb 'extrakt'; did you mean 'extract'?")
    assert err.count("\n") == 1


def test_an_error_is_one_line_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["extract", "/no/such/folder"]) == 2
    err = capsys.readouterr().err
    assert err.splitlines()[-1].startswith("densedino: error:")
    assert "/no/such/folder" in err
    assert "Traceback" not in err


def test_a_misspelt_flag_is_refused() -> None:
    with pytest.raises(SystemExit) as stop:
        main(["models", "--no-such-flag"])
    assert stop.value.code == 2


def test_a_reader_that_has_seen_enough_ends_it_quietly() -> None:
    process = subprocess.run(
        f"'{sys.executable}' -m densedino models | head -1", shell=True, capture_output=True, text=True, timeout=60
    )
    assert "Traceback" not in process.stderr
    assert process.stdout.startswith("model")
