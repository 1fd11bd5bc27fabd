"""Owns the metrics of ranked lists: average precision by TREC's and by Oxford's rule, and precision at k."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["average_precision", "micro_average_precision", "oxford_average_precision", "precision_at"]


def average_precision(relevant: NDArray[np.bool_], *, total: int | None = None) -> float:
    """TREC's average precision: the mean, over all relevant items, of the precision at the rank of each.

    Args:
        relevant: of each item of the list, best first, whether it is relevant.
        total: relevant items that there are, found or not; those in the list if not given.

    Returns:
        0 to 1; NaN if there is nothing relevant.
    """
    total = int(relevant.sum()) if total is None else total
    if not total:
        return float("nan")
    ranks = np.flatnonzero(relevant)
    return float(((np.arange(len(ranks)) + 1) / (ranks + 1)).sum() / total)


def oxford_average_precision(
    ranked: NDArray[np.integer], *, positive: NDArray[np.integer], junk: NDArray[np.integer]
) -> float:
    """Average precision of the Oxford and Paris benchmarks: junk is taken out of the list; trapezoids of precision.

    The area under the curve is summed by trapezoids between ranks (Philbin et al., CVPR 2007; the revisited
    benchmark, arXiv 1803.11285, keeps it). NaN if there are no positives.
    """
    if not len(positive):
        return float("nan")
    kept = ranked[~np.isin(ranked, junk)]
    ranks = np.flatnonzero(np.isin(kept, positive))
    found = np.arange(len(ranks))
    before = np.where(ranks == 0, 1.0, found / np.maximum(ranks, 1))
    return float(((before + (found + 1) / (ranks + 1)) / 2).sum() / len(positive))


def precision_at(
    ranked: NDArray[np.integer], k: int, *, positive: NDArray[np.integer], junk: NDArray[np.integer]
) -> float:
    """Share of positives among the first k of the list without junk, as the revisited benchmark has it.

    With fewer than k positives found in the whole list, k is the rank of the last one. NaN if there are no positives.
    """
    if not len(positive):
        return float("nan")
    kept = ranked[~np.isin(ranked, junk)]
    ranks = np.flatnonzero(np.isin(kept, positive)) + 1
    if not len(ranks):
        return 0.0
    k = min(int(ranks[-1]), k)
    return float((ranks <= k).sum() / k)


def micro_average_precision(scores: NDArray[np.floating], correct: NDArray[np.bool_], *, total: int) -> float:
    """Average precision over the pairs of all queries in one list, as copy detection is judged (arXiv 2106.09672).

    Pairs are ordered by score, ties by their order; `total` pairs are true.
    """
    return average_precision(correct[np.argsort(-scores, kind="stable")], total=total)
