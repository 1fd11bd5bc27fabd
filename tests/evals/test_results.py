"""Comparing two results."""

from __future__ import annotations

from densedino.evals.results import compare


def results(value: float, *, name: str = "miou") -> dict:
    metric = {"mean": value, "std": 0.0, "values": [value, None]}
    return {"rows": [{"model": "m", "head": "h", "metrics": {name: metric}}]}


def test_numbers_are_compared_in_their_places() -> None:
    same = compare(results(50.0), results(50.05), tolerance=0.1)
    assert same.matched == 4 and not same.differing and abs(same.largest - 0.05) < 1e-9
    apart = compare(results(50.0), results(51.0), tolerance=0.1)
    assert len(apart.differing) == 2 and "m / h / miou / mean: 50.0 there, 51.0 here" in apart.differing
    other = compare(results(50.0), results(50.0, name="f"), tolerance=0.1)
    assert len(other.differing) == 8 and other.matched == 0, "what only one has differs, also if it is None"
