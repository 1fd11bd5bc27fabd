"""Ranked lists against scikit-learn, TREC's and Oxford's definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from densedino.evals.ranking import (
    average_precision,
    micro_average_precision,
    oxford_average_precision,
    precision_at,
)


@given(seed=st.integers(0, 10**6), n=st.integers(1, 40))
@settings(max_examples=40, deadline=None)
def test_average_precision_is_that_of_scikit_learn(seed: int, n: int) -> None:
    from sklearn.metrics import average_precision_score

    rng = np.random.default_rng(seed)
    relevant = rng.random(n) < 0.3
    relevant[rng.integers(n)] = True
    assert average_precision(relevant) == pytest.approx(average_precision_score(relevant, -np.arange(n)))
    scores = rng.permutation(n).astype(float)
    found = micro_average_precision(scores, relevant, total=int(relevant.sum()))
    assert found == pytest.approx(average_precision_score(relevant, scores))
    assert average_precision(relevant, total=2 * int(relevant.sum())) == pytest.approx(average_precision(relevant) / 2)


def test_trec_by_hand() -> None:
    assert average_precision(np.array([1, 0, 1, 0, 0, 1], bool)) == pytest.approx((1 / 1 + 2 / 3 + 3 / 6) / 3)
    assert math.isnan(average_precision(np.zeros(3, bool)))


def test_oxford_leaves_junk_out_and_takes_trapezoids() -> None:
    ranked = np.array([9, 1, 7, 5, 2, 3])
    positive, junk = np.array([1, 2]), np.array([9, 5])
    # Without junk: 1 (positive, rank 0), 7, 2 (positive, rank 2), 3.
    expected = ((1 + 1 / 1) / 2 + (1 / 2 + 2 / 3) / 2) / 2
    assert oxford_average_precision(ranked, positive=positive, junk=junk) == pytest.approx(expected)
    assert precision_at(ranked, 1, positive=positive, junk=junk) == 1.0
    assert precision_at(ranked, 10, positive=positive, junk=junk) == pytest.approx(2 / 3)
    assert math.isnan(oxford_average_precision(ranked, positive=positive[:0], junk=junk))
    assert math.isnan(precision_at(ranked, 1, positive=positive[:0], junk=junk))
    assert precision_at(ranked, 5, positive=np.array([99]), junk=junk) == 0.0
