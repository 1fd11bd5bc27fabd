"""Copy detection: a made set, and micro average precision against scikit-learn."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from densedino.errors import InputError
from densedino.evals.copies import Settings, figures, find_copies
from densedino.evals.plan import Plan
from densedino.evals.run import evaluate

if TYPE_CHECKING:
    from pathlib import Path


def test_added_histograms_are_the_ranking_of_all_pairs() -> None:
    from sklearn.metrics import average_precision_score

    rng = np.random.default_rng(0)
    steps, cosines = 2000, np.round(rng.uniform(-1, 1, (40, 5)), 3)
    correct = rng.random((40, 5)) < 0.3
    at = ((cosines + 1) / 2 * steps).round().astype(int)
    right, wrong = (np.bincount(at[part], minlength=steps + 1) for part in (correct, ~correct))
    sums = {"right": right, "wrong": wrong, "pairs": correct.sum(), "ap": np.float64(0), "queries": np.int64(1)}
    found = figures(sums, Settings(steps=steps))
    assert found["uap"] == pytest.approx(100 * average_precision_score(correct.ravel(), cosines.ravel()))
    assert np.isnan(figures({**sums, "pairs": np.int64(0)}, Settings(steps=steps))["uap"])


def test_a_made_set(class_folder: Path, tmp_path: Path, silent: Any) -> None:
    root = tmp_path / "data"
    for folder in ("references", "queries"):
        (root / folder).mkdir(parents=True)
    for i in range(3):
        shutil.copy(class_folder / f"train/class{i}/0.png", root / f"references/r{i}.png")
        shutil.copy(class_folder / f"val/class{i}/0.png", root / f"queries/q{i}.png")
    (root / "pairs.csv").write_text("query,reference\nq0,r0\nq1,r1\nq2,\n")
    plan = Plan(protocol="copies", data=root, models=("raw",), output=tmp_path / "run", settings=Settings(nearest=1))
    metrics = evaluate(plan, narrator=silent, workers=0)["rows"][0]["metrics"]
    assert metrics["map"]["mean"] == 100 and metrics["uap"]["mean"] > 50
    (root / "pairs.csv").write_text("query,reference\nq0,r9\n")
    with pytest.raises(InputError, match=r"\['q0', 'r9'\]"):
        find_copies(root)
    (root / "pairs.csv").unlink()
    with pytest.raises(InputError, match="needs references/"):
        find_copies(root)
