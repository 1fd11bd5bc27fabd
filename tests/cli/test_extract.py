"""`densedino extract` as a user runs it: what it says, what it leaves, how it ends."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

import densedino as dd
from densedino.cli.main import main

TINY = ["--model", "debug_vit", "--weights", "random", "--device", "cpu"]


@pytest.fixture
def here(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").symlink_to(photos)
    return tmp_path


def test_the_main_job(here, capsys):
    assert main(["extract", "photos", *TINY]) == 0
    out, err = capsys.readouterr()
    assert "UNTRAINED" in err
    assert "4 of 4 inputs" in err
    patches = int(re.search(r"takes +([\d,]+) patches", err)[1].replace(",", ""))
    assert "memory     at most about" in err
    assert "features: 4 images done in" in out
    store = dd.FeatureStore("features")
    assert patches == sum(features.grid[0] * features.grid[1] for features in store)
    command = re.search(r"import densedino as dd; (store = .*)$", out, re.MULTILINE)[1]
    names = {"dd": dd}
    exec(command, names)
    assert len(names["store"]) == 4

    assert main(["extract", "photos", *TINY]) == 0
    out, err = capsys.readouterr()
    assert "0 of 4 inputs; 4 done before" in err
    assert "0 images done" in out
    assert "4 done before" in out


def test_options_reach_the_model(here, capsys):
    options = ["--resize", "64x96", "--max-tokens", "20", "--layers", "0", "-1", "--batch-size", "2", "--limit", "3"]
    assert main(["extract", "photos", "-o", "out/deep", *options, "--precision", "bf16", *TINY]) == 0
    store = dd.FeatureStore("out/deep")
    assert len(store) == 3
    assert store.transform.resize == (64, 96)
    assert store.transform.max_tokens == 20
    assert store.metadata["layers"] == [0, 1]
    assert store.metadata["precision"] == "bf16"
    assert store[0].grid == (4, 5)
    assert "more patches than --max-tokens: 3 images" in capsys.readouterr().err
    assert main(["extract", "photos", "-o", "crop", "--fit", "crop", "--max-tokens", "0", *TINY]) == 0
    assert dd.FeatureStore("crop").transform.max_tokens is None


def test_single_files(here, capsys):
    assert main(["extract", "photos/astronaut.jpg", "-o", "npz", "--format", "npz", *TINY]) == 0
    with np.load("npz/photos/astronaut.jpg.npz") as archive:
        assert archive["patches"].dtype == np.float16
    assert "1 npz files" in capsys.readouterr().out


def test_some_bad_files_are_reported_and_fine_all_bad_are_not(here, capsys):
    for number in range(7):
        Path(f"bad{number}.jpg").write_bytes(b"\xff\xd8\xff not a picture")
    assert main(["extract", "photos", "bad*.jpg", *TINY]) == 0
    out, err = capsys.readouterr()
    assert "4 images done" in out
    assert "7 in quarantine (features/quarantine.jsonl)" in out
    assert len(re.findall(r"^quarantined bad\d\.jpg: ", err, re.MULTILINE)) == 5
    assert "… and 2 more" in err
    assert main(["extract", "bad*.jpg", "-o", "none", *TINY]) == 1
    assert "No input could be used" in capsys.readouterr().out
    assert main(["extract", "bad*.jpg", "-o", "none", *TINY]) == 1
    assert "7 in quarantine (--retry tries again)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--resize", "big"], "--resize 'big': give native, 512"),
        (["--resize", "0x16"], "--resize '0x16'"),
        (["--batch-size", "0"], "--batch-size '0': give a number"),
        (["--max-tokens", "-1"], "--max-tokens -1"),
        (["--limit", "0"], "limit is 0"),
        (["--layers", "9"], "block indices"),
        (["-o", "photos"], "is not empty and holds no features"),
    ],
)
def test_wrong_options_are_one_line(here, capsys, options, message):
    assert main(["extract", "photos", *options, *TINY]) == 2
    err = capsys.readouterr().err
    assert err.startswith("densedino: error: ")
    assert message in err
    assert err.count("\n") == 1
    assert not Path("features").exists()


def test_no_inputs_say_what_is_looked_for(here, capsys):
    assert main(["extract", *TINY]) == 2
    assert "no inputs: densedino extract photos/" in capsys.readouterr().err


def test_lines_instead_of_a_bar_in_a_log(here, capsys, monkeypatch):
    monkeypatch.setattr("densedino.cli.progress._LINE_EVERY", 0.0)
    assert main(["extract", "photos", *TINY]) == 0
    err = capsys.readouterr().err
    assert re.search(r"progress   \d of 4, \d+ s left, [\d.]+ images/s", err)


def test_a_bar_on_a_terminal(here, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_INTERACTIVE", "1")
    assert main(["extract", "photos", *TINY]) == 0
    err = capsys.readouterr().err
    assert "4/4" in err
    assert "images/s" in err
