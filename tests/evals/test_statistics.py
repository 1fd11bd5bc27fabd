"""Means, deviations and paired bootstrap."""

from __future__ import annotations

import numpy as np
import pytest

from densedino.errors import InputError
from densedino.evals.protocol import Scores
from densedino.evals.statistics import bootstrap, difference, interval, summary, total


def scores(values: np.ndarray) -> Scores:
    return Scores(keys=tuple(map(str, range(len(values)))), counts={"hits": values, "n": np.ones(len(values), int)})


def mean(sums: dict) -> float:
    return float(sums["hits"] / sums["n"])


def test_summary_is_that_of_a_sample() -> None:
    assert summary([1.0, 2.0, 4.0]) == (pytest.approx(7 / 3), pytest.approx(np.std([1, 2, 4], ddof=1)))
    assert summary([3.0]) == (3.0, 0.0)


def test_the_interval_of_a_mean_is_what_theory_says() -> None:
    values = np.random.default_rng(0).normal(5, 2, 400)
    low, high = interval(bootstrap([scores(values)], mean, draws=2000))
    error = values.std() / 20
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)


def test_pairing_takes_out_what_both_share() -> None:
    rng = np.random.default_rng(0)
    hard = rng.normal(0, 10, 200)
    one, other = scores(hard + 1 + rng.normal(0, 0.1, 200)), scores(hard)
    low, high = difference(bootstrap([one], mean), bootstrap([other], mean))
    assert 0.95 < low < 1 < high < 1.05
    seeds = bootstrap([one, scores(hard + 3)], mean)
    assert seeds.std() > bootstrap([one], mean).std() * 0.9
    with pytest.raises(InputError, match="different images"):
        bootstrap([one, scores(hard[:5])], mean)


def test_integers_stay_integers() -> None:
    counts = Scores(keys=("a", "b"), counts={"n": np.array([[1, 2], [3, 4]])})
    assert total(counts)["n"].tolist() == [4, 6] and total(counts)["n"].dtype.kind == "i"
    assert all(np.isnan(interval(np.array([np.nan]))))
