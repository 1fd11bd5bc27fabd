"""Scores on disk, and what is said of the machine."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest

import densedino
from densedino.errors import InputError
from densedino.evals.protocol import Scores
from densedino.evals.run_folder import RunFolder, environment

if TYPE_CHECKING:
    from pathlib import Path


def test_scores_come_back_as_they_were(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    scores = Scores(keys=("a/b.png", "ü"), counts={"n": np.array([[1, 2], [3, 2**40]]), "x": np.array([0.1, 0.2])})
    path = folder.scores_path("m", "linear", 3)
    folder.save_scores(path, scores, lambda sums: {"x": float(sums["x"]), "none": float("nan")})
    found = folder.load_scores(path)
    assert found.keys == scores.keys
    for name, values in scores.counts.items():
        np.testing.assert_array_equal(found.counts[name], values)
    lines = [json.loads(line) for line in path.with_suffix(".jsonl").read_text().splitlines()]
    assert lines == [{"key": "a/b.png", "x": 0.1}, {"key": "ü", "x": 0.2}]


def test_two_runs_in_one_folder_are_refused(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    with folder.alone(), pytest.raises(InputError, match="another process evaluates into"), folder.alone():
        pass
    with folder.alone():
        folder.begin({"output": "", "data": ""}, [])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("")
    with pytest.raises(InputError, match="holds no evaluation"):
        RunFolder(tmp_path / "mine").begin({"output": "", "data": ""}, [])


def test_the_environment_names_versions() -> None:
    found = environment()
    assert found["densedino"] == densedino.__version__ and found["libraries"]["torch"]
