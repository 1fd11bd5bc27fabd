"""Owns `results.json`: what the scores of a run amount to, and whether two of them agree."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from densedino.evals.published import published_value
from densedino.evals.statistics import bootstrap, difference, interval, summary, total

if TYPE_CHECKING:
    from collections.abc import Mapping

    from densedino.evals.datasets import Dataset
    from densedino.evals.plan import Plan
    from densedino.evals.protocol import Protocol, Scores

__all__ = ["Agreement", "compare", "results_of"]

_DIGITS = 6


def results_of(
    plan: Plan,
    protocol: Protocol,
    data: Dataset,
    scores: Mapping[tuple[str, str, int], Scores],
    *,
    manifest_sha256: str,
    weights: Mapping[str, str],
) -> dict[str, Any]:
    """Everything that a run found, without times and paths: equal for equal runs.

    Every row is a backbone with a head. `interval` is the 95 % of a bootstrap over images and seeds; `against_first`
    is the difference to the first model with the same head (the first row for others), from paired draws. `weights`
    names those of each model, for which a figure may have been published.
    """
    runs: dict[tuple[str, str], list[Scores]] = {}
    for (model, head, _), one in scores.items():
        runs.setdefault((model, head), []).append(one)
    order = sorted(runs, key=lambda row: (plan.models.index(row[0]), row[1]))

    def figures(sums: Any) -> dict[str, float]:
        return protocol.figures(sums, plan.settings)

    headline = next(iter(figures(total(runs[order[0]][0]))))
    draws = {row: bootstrap(runs[row], lambda sums: figures(sums)[headline]) for row in order}
    rows = []
    for row in order:
        found = [figures(total(one)) for one in runs[row]]
        metrics = {name: _metric([one[name] for one in found]) for name in found[0]}
        metrics[headline]["interval"] = [_rounded(v) for v in interval(draws[row])]
        first = next((other for other in order if other[1] == row[1]), order[0])
        first = first if first[0] == plan.models[0] else order[0]
        entry: dict[str, Any] = {"model": row[0], "head": row[1], "seeds": len(found), "metrics": metrics}
        if first != row:
            gap = metrics[headline]["mean"] - _metric([figures(total(one))[headline] for one in runs[first]])["mean"]
            bounds = [_rounded(v) for v in difference(draws[row], draws[first])]
            entry["against_first"] = {"row": list(first), "difference": _rounded(gap), "interval": bounds}
        found_elsewhere = published_value(protocol.name, data.layout, weights.get(row[0], ""), folder=plan.data.name)
        if found_elsewhere is not None:
            entry["published"] = {"metric": found_elsewhere[0], "value": found_elsewhere[1], "source": "model card"}
        rows.append(entry)
    return {
        "protocol": protocol.name,
        "headline": headline,
        "rule": protocol.rule,
        "share": plan.share,
        "data": {
            "layout": data.layout,
            "train": len(data.train),
            "test": len(data.test),
            "classes": list(data.classes),
            "manifest_sha256": manifest_sha256,
        },
        "rows": rows,
    }


def _metric(values: list[float]) -> dict[str, Any]:
    mean, deviation = summary(values)
    return {"mean": _rounded(mean), "std": _rounded(deviation), "values": [_rounded(value) for value in values]}


def _rounded(value: float) -> float | None:
    return None if math.isnan(value) else round(float(value), _DIGITS)


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How two results compare."""

    matched: int
    differing: tuple[str, ...]
    """A line for each number that differs."""
    largest: float
    """Difference among all numbers."""


def compare(old: Mapping[str, Any], new: Mapping[str, Any], *, tolerance: float) -> Agreement:
    """Compare the numbers of all rows, each with its place."""
    one, other = _numbers(old), _numbers(new)
    differing, largest, matched = [], 0.0, 0
    for place in sorted(one.keys() | other.keys()):
        a, b = one.get(place), other.get(place)
        gap = (
            abs(a - b)
            if a is not None and b is not None
            else (0.0 if place in one and place in other and a is b else np.inf)
        )
        largest = max(largest, gap if math.isfinite(gap) else largest)
        if gap > tolerance:
            differing.append(f"{place}: {a} there, {b} here")
        else:
            matched += 1
    return Agreement(matched=matched, differing=tuple(differing), largest=largest)


def _numbers(results: Mapping[str, Any]) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for row in results["rows"]:
        for name, metric in row["metrics"].items():
            place = f"{row['model']} / {row['head']} / {name}"
            found |= {f"{place} / mean": metric["mean"], f"{place} / std": metric["std"]}
            found |= {f"{place} / seed {i}": value for i, value in enumerate(metric["values"])}
    return found
