"""Owns the logistic regression protocol: L-BFGS on CLS, its strength chosen on a held-out part."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from densedino.errors import require
from densedino.evals.knn import labels_of
from densedino.evals.labelled import find_labelled
from densedino.evals.linear import count_correct, held_out, top1
from densedino.evals.protocol import Protocol, Scores, Task

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["PROTOCOL", "Settings"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """DINOv2's: C from 10^low to 10^high in `candidates` steps; float64."""

    low: float = -6.0
    high: float = 5.0
    candidates: int = 45
    iterations: int = 1000
    tolerance: float = 1e-12
    held_out: float = 0.1


def _fit(x: NDArray[np.float64], y: NDArray[np.int64], *, strength: float, settings: Settings) -> Any:
    linear_model = require("sklearn.linear_model", extra="eval", purpose="logistic regression")
    model = linear_model.LogisticRegression(C=strength, max_iter=settings.iterations, tol=settings.tolerance)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # large C never reaches 1e-12; the iterations are the rule
        return model.fit(x, y)


def evaluate(head: str, task: Task) -> Scores:
    """Whether each test image is classified rightly."""
    settings: Settings = task.settings
    train, test = labels_of(task)
    x, queries = (task.stored.vectors(part).double().numpy() for part in (task.train, task.data.test))
    y = train.numpy()
    learn, choose = (places.numpy() for places in held_out(train, settings.held_out, seed=task.seed))
    strengths = np.logspace(settings.low, settings.high, settings.candidates)
    best = 1.0
    if len(choose) and len(np.unique(y[learn])) > 1:
        scores = [
            _fit(x[learn], y[learn], strength=c, settings=settings).score(x[choose], y[choose]) for c in strengths
        ]
        best = float(strengths[int(np.argmax(scores))])
    model = _fit(x, y, strength=best, settings=settings)
    return count_correct(torch.from_numpy(model.predict(queries)), test, task)


PROTOCOL = Protocol(
    name="logistic",
    find=find_labelled,
    settings=Settings,
    heads=lambda settings: ("logistic",),
    evaluate=evaluate,
    figures=top1,
    rule="CLS after the final norm, as it is.",
    resize=224,
    random_heads=frozenset({"logistic"}),
)
