"""Logistic regression: a whole run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from densedino.evals.logistic import Settings
from densedino.evals.plan import Plan
from densedino.evals.run import evaluate

if TYPE_CHECKING:
    from pathlib import Path


def test_a_run_learns_classes_by_colour(class_folder: Path, tmp_path: Path, silent: Any) -> None:
    plan = Plan(
        protocol="logistic",
        data=class_folder,
        models=("raw",),
        output=tmp_path / "run",
        seeds=2,
        share=0.5,
        settings=Settings(candidates=4),
    )
    row = evaluate(plan, narrator=silent, workers=0)["rows"][0]
    assert row["seeds"] == 2 and row["metrics"]["top1"]["mean"] == 100
