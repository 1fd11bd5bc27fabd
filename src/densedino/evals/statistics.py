"""Owns what scores amount to: means and deviations over seeds, and paired bootstrap intervals over images and seeds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from densedino.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from densedino.evals.metrics import Sums
    from densedino.evals.protocol import Scores

__all__ = ["bootstrap", "difference", "interval", "summary", "total"]


def total(scores: Scores) -> dict[str, NDArray[Any]]:
    """Sums over all images; integers stay integers."""
    return {name: np.asarray(values.sum(axis=0)) for name, values in scores.counts.items()}


def summary(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation (of a sample, n − 1) over seeds; the deviation of one value is 0."""
    array = np.asarray(values, np.float64)
    return float(array.mean()), float(array.std(ddof=1)) if len(array) > 1 else 0.0


def bootstrap(
    runs: Sequence[Scores], metric: Callable[[Sums], float], *, draws: int = 1000, seed: int = 0
) -> NDArray[np.float64]:
    """The metric's mean over seeds, of `draws` resamplings of images and of seeds: [draws].

    The draws of images depend on `seed` and the number of images alone: of two rows on the same images they are the
    same, so that their difference, draw by draw, is paired.

    Raises:
        InputError: the runs are not on the same images.
    """
    keys = runs[0].keys
    if any(run.keys != keys for run in runs):
        raise InputError("runs on different images cannot be bootstrapped together.")
    rng = np.random.default_rng([seed, len(keys)])
    weights = rng.multinomial(len(keys), np.full(len(keys), 1 / len(keys)), size=draws)
    by_seed = np.empty((len(runs), draws))
    for i, run in enumerate(runs):
        sums: dict[str, Any] = {name: np.tensordot(weights, v, axes=(1, 0)) for name, v in run.counts.items()}
        by_seed[i] = [metric({name: value[d] for name, value in sums.items()}) for d in range(draws)]
    picked = np.random.default_rng([seed, len(runs), 7]).integers(0, len(runs), (draws, len(runs)))
    return np.take_along_axis(by_seed.T, picked, axis=1).mean(axis=1)


def interval(values: NDArray[np.float64], *, level: float = 0.95) -> tuple[float, float]:
    """The middle `level` of bootstrapped values, by percentiles; what is not a number is left out."""
    real = values[~np.isnan(values)]
    if not len(real):
        return float("nan"), float("nan")
    low, high = np.quantile(real, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def difference(one: NDArray[np.float64], other: NDArray[np.float64]) -> tuple[float, float]:
    """The interval of a paired difference: `one` minus `other`, draw by draw."""
    return interval(one - other)
