"""Owns the metrics of maps, points, boxes and depths: sums per image, and what the sums of a data set say.

Every metric has two halves. `count_…` turns one image into sums (integers wherever things are counted); `…_of` turns
sums, of one image or added over any of them, into figures. Added sums are exact, so that the order, the number of
processes and a resumption change nothing, and a bootstrap over images is a weighted sum.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from densedino.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import ArrayLike, NDArray

    Counts = dict[str, Any]
    """Arrays and NumPy's numbers, by name."""
    Sums = Mapping[str, Any]

__all__ = [
    "boxes_iou",
    "count_classes",
    "count_depth",
    "count_points",
    "depth_of",
    "iou_of",
    "pck_of",
]


def count_classes(
    predicted: NDArray[np.integer], true: NDArray[np.integer], *, num_classes: int, ignore: int | None = None
) -> Counts:
    """Pixels of each class in maps of one shape: `hits`, `predicted` and `true`, int64 [C].

    Where `true` is `ignore` (void) nothing is counted, whatever is predicted there.

    Raises:
        InputError: the shapes differ, or a value is neither a class nor, in `true`, `ignore`.
    """
    if predicted.shape != true.shape:
        raise InputError(f"predictions {predicted.shape} and labels {true.shape} differ in shape.")
    p, t = predicted.reshape(-1), true.reshape(-1)
    if ignore is not None:
        real = t != ignore
        if not real.all():
            p, t = p[real], t[real]
    for name, values in (("predictions", p), ("labels", t)):
        if len(values) and not (int(values.min()) >= 0 and int(values.max()) < num_classes):
            void = "" if ignore is None else f", and {ignore} for void"
            raise InputError(
                f"{name} span {int(values.min())} to {int(values.max())}; valid are 0 to {num_classes - 1}{void}."
            )
    return {
        "hits": np.bincount(t[p == t], minlength=num_classes),
        "predicted": np.bincount(p, minlength=num_classes),
        "true": np.bincount(t, minlength=num_classes),
    }


def iou_of(sums: Sums) -> dict[str, float]:
    """Mean IoU, pixel accuracy and mean class accuracy in percent, of the sums of `count_classes`.

    IoU is averaged over classes that occur in labels or predictions, class accuracy over those in labels; NaN if there
    are none.
    """
    hits, predicted, true = (sums[name].astype(np.float64) for name in ("hits", "predicted", "true"))
    union = predicted + true - hits
    return {
        "miou": 100 * _mean(_ratio(hits, union)[union > 0]),
        "pixel_accuracy": 100 * float(_ratio(hits.sum(), true.sum())),
        "class_accuracy": 100 * _mean(_ratio(hits, true)[true > 0]),
    }


def count_depth(predicted: NDArray[np.floating], true: NDArray[np.floating], *, valid: NDArray[np.bool_]) -> Counts:
    """The errors of one image's depths in metres, each averaged over its `valid` pixels, and that it is one image.

    Figures are averaged over images, as in Eigen et al. (arXiv 1406.2283) and all after them. `silog` is
    100·sqrt(mean(d²) − mean(d)²) with d = ln predicted − ln true.

    Raises:
        InputError: the shapes differ, nothing is valid, or a valid depth is not above 0.
    """
    if not predicted.shape == true.shape == valid.shape:
        raise InputError(f"depths {predicted.shape}, labels {true.shape} and mask {valid.shape} differ in shape.")
    p, t = predicted[valid].astype(np.float64), true[valid].astype(np.float64)
    if not len(t) or not (p.min() > 0 and t.min() > 0):
        raise InputError(f"{len(t)} valid depths; there must be some, and all, also predicted ones, above 0.")
    ratio, logs = np.maximum(p / t, t / p), np.log(p) - np.log(t)
    means = {
        "rmse": np.sqrt(np.mean((p - t) ** 2)),
        "abs_rel": np.mean(np.abs(p - t) / t),
        "sq_rel": np.mean((p - t) ** 2 / t),
        "rmse_log": np.sqrt(np.mean(logs**2)),
        "log10": np.mean(np.abs(logs)) / np.log(10),
        "silog": 100 * np.sqrt(max(np.mean(logs**2) - np.mean(logs) ** 2, 0.0)),
        **{f"delta{n}": np.mean(ratio < 1.25**n) for n in (1, 2, 3)},
    }
    return {**{name: np.float64(value) for name, value in means.items()}, "images": np.int64(1)}


def depth_of(sums: Sums) -> dict[str, float]:
    """Means over images of what `count_depth` found."""
    return {name: float(_ratio(total, sums["images"])) for name, total in sums.items() if name != "images"}


def count_points(errors: NDArray[np.floating], *, scale: float, thresholds: tuple[float, ...]) -> Counts:
    """Of points with those errors (pixels): how many are within threshold · `scale` (at most), how many there are.

    Returns:
        `correct`, int64 [thresholds], `points`, and `shares`: the share of this image by itself [thresholds].
    """
    limits = np.asarray(thresholds) * scale
    correct = (errors[:, None] <= limits).sum(0)
    return {
        "correct": correct,
        "points": np.int64(len(errors)),
        "shares": _ratio(correct, np.int64(len(errors))),
        "images": np.int64(1),
    }


def pck_of(sums: Sums, thresholds: tuple[float, ...]) -> dict[str, float]:
    """PCK in percent at each threshold: over all points, and as the mean over images (`per_image`)."""
    figures = {}
    for i, threshold in enumerate(thresholds):
        figures[f"pck@{threshold:g}"] = 100 * float(_ratio(sums["correct"][i], sums["points"]))
        figures[f"pck@{threshold:g}_per_image"] = 100 * float(_ratio(sums["shares"][i], sums["images"]))
    return figures


def boxes_iou(one: NDArray[np.floating], others: NDArray[np.floating]) -> NDArray[np.float64]:
    """IoU of a box (x0, y0, x1, y1; x1 and y1 exclusive) with each of `others` [n, 4]: [n]."""
    low, high = np.maximum(one[:2], others[:, :2]), np.minimum(one[2:], others[:, 2:])
    both = np.prod(np.clip(high - low, 0, None), axis=1)
    areas = np.prod(others[:, 2:] - others[:, :2], axis=1) + np.prod(one[2:] - one[:2])
    return _ratio(both, areas - both)


def _ratio(part: ArrayLike, whole: ArrayLike) -> NDArray[np.float64]:
    part, whole = np.asarray(part, np.float64), np.asarray(whole, np.float64)
    return np.divide(part, whole, out=np.full(np.broadcast(part, whole).shape, np.nan), where=whole != 0)


def _mean(values: NDArray[np.float64]) -> float:
    return float(values.mean()) if len(values) else float("nan")
