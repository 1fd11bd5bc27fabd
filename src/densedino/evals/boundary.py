"""Owns boundary metrics: F of all classes of a segmentation at once, and the J and F of DAVIS for one object."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

import numpy as np

from densedino.errors import InputError, require

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from densedino.evals.metrics import Counts, Sums

__all__ = ["boundary_f_of", "boundary_tolerance", "count_boundaries", "davis_f", "davis_j", "davis_outline"]


def boundary_tolerance(shape: tuple[int, int], *, share: float = 0.0075) -> int:
    """How many pixels two boundaries may be apart: that share of the diagonal, rounded, at least 1.

    0.0075 is what Csurka et al. (BMVC 2013) take for segmentation; DAVIS has 0.008, rounded up.
    """
    return max(1, round(share * math.hypot(*shape)))


def count_boundaries(
    predicted: NDArray[np.integer],
    true: NDArray[np.integer],
    *,
    num_classes: int,
    ignore: int | None = None,
    tolerance: int | None = None,
) -> Counts:
    """Boundary pixels of each class [C] int64: of predictions, of labels, and of each how many the other one has near.

    A pixel belongs to the boundary of its class if one of its four neighbours is of another class. Void is no class:
    it makes no boundaries, and predictions there are void too; nor does the border of the image. A pixel is matched
    if a boundary pixel of the same class of the other map is at most `tolerance` pixels away (Euclidean;
    `boundary_tolerance` of the shape if not given).

    Time grows with the tolerance squared, not with the classes: all are compared at once, offset by offset.

    Raises:
        InputError: the shapes differ.
    """
    if predicted.shape != true.shape:
        raise InputError(f"predictions {predicted.shape} and labels {true.shape} differ in shape.")
    radius = boundary_tolerance(true.shape) if tolerance is None else tolerance
    dtype = np.uint8 if num_classes < 255 else np.uint16  # the last value marks pixels that are on no boundary
    none = np.iinfo(dtype).max
    real = np.ones(true.shape, np.bool_) if ignore is None else true != ignore
    ours = _boundary_labels(predicted, real, none=none, dtype=dtype)
    theirs = _boundary_labels(true, real, none=none, dtype=dtype)
    counts: Counts = {}
    for name, one, other in (("predicted", ours, theirs), ("true", theirs, ours)):
        labels, near = _matched(one, other, radius=radius, none=none)
        counts[f"boundary_{name}"] = np.bincount(labels, minlength=num_classes)
        counts[f"boundary_{name}_near"] = np.bincount(labels[near], minlength=num_classes)
    return counts


def _boundary_labels(
    labels: NDArray[np.integer], real: NDArray[np.bool_], *, none: int, dtype: type[np.unsignedinteger]
) -> NDArray[np.unsignedinteger]:
    """The class of each boundary pixel, `none` elsewhere."""
    values = np.where(real, labels, none).astype(dtype)
    edge = np.zeros(values.shape, np.bool_)
    across = (values[:, 1:] != values[:, :-1]) & real[:, 1:] & real[:, :-1]
    down = (values[1:] != values[:-1]) & real[1:] & real[:-1]
    edge[:, 1:] |= across
    edge[:, :-1] |= across
    edge[1:] |= down
    edge[:-1] |= down
    return np.where(edge, values, dtype(none))


@functools.lru_cache(maxsize=16)
def _disk(radius: int) -> tuple[tuple[int, int], ...]:
    """Offsets (dy, dx) within a circle, nearest first."""
    span = range(-radius, radius + 1)
    inside = [(dy, dx) for dy in span for dx in span if dy * dy + dx * dx <= radius * radius]
    return tuple(sorted(inside, key=lambda offset: (offset[0] ** 2 + offset[1] ** 2, offset)))


def _matched(
    one: NDArray[np.unsignedinteger], other: NDArray[np.unsignedinteger], *, radius: int, none: int
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """The labels of the boundary pixels of `one`, and whether `other` has its like within the circle."""
    padded = np.pad(other, radius, constant_values=none)
    width = padded.shape[1]
    y, x = np.nonzero(one != none)
    labels = one[y, x]
    flat, places = padded.reshape(-1), (y + radius) * width + x + radius
    near = np.zeros(len(labels), np.bool_)
    left, wanted, at = np.arange(len(labels)), labels, places
    for dy, dx in _disk(radius):
        hit = flat[at + (dy * width + dx)] == wanted
        if hit.any():
            near[left[hit]] = True
            keep = ~hit
            left, wanted, at = left[keep], wanted[keep], at[keep]
            if not len(left):
                break
    return labels.astype(np.int64), near


def boundary_f_of(sums: Sums) -> dict[str, float]:
    """Boundary F in percent: the harmonic mean of precision and recall of each class, averaged over classes.

    Classes count that have a boundary in labels or predictions; NaN if none has.
    """
    predicted, true = (sums[f"boundary_{name}"].astype(np.float64) for name in ("predicted", "true"))
    with np.errstate(divide="ignore", invalid="ignore"):
        precision = np.where(predicted > 0, sums["boundary_predicted_near"] / predicted, 0.0)
        recall = np.where(true > 0, sums["boundary_true_near"] / true, 0.0)
        f = np.where(precision + recall > 0, 2 * precision * recall / (precision + recall), 0.0)
    there = predicted + true > 0
    return {"boundary_f": 100 * float(f[there].mean()) if there.any() else float("nan")}


def davis_j(predicted: NDArray[np.bool_], true: NDArray[np.bool_]) -> float:
    """Region similarity: IoU of two masks; 1 if both are empty (Perazzi et al., CVPR 2016, §4.1)."""
    union = int((predicted | true).sum())
    return int((predicted & true).sum()) / union if union else 1.0


def davis_outline(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The one-pixel outline that DAVIS takes: a pixel that differs from its right, lower, or lower right neighbour.

    In the last row only the right one counts, in the last column only the lower one.
    """
    grown = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    outline: NDArray[np.bool_] = (mask != grown[:-1, 1:]) | (mask != grown[1:, :-1])
    outline[:-1, :-1] |= mask[:-1, :-1] != mask[1:, 1:]
    return outline


def davis_f(predicted: NDArray[np.bool_], true: NDArray[np.bool_], *, tolerance: float = 0.008) -> float:
    """Contour accuracy F of two masks (Perazzi et al., CVPR 2016, §4.1), matched by dilation as DAVIS computes it.

    Args:
        predicted: [H, W].
        true: [H, W].
        tolerance: of the diagonal, rounded up; or in pixels from 1 on.
    """
    edt = require("scipy.ndimage", extra="eval", purpose="contour accuracy").distance_transform_edt
    radius = tolerance if tolerance >= 1 else math.ceil(tolerance * math.hypot(*true.shape))
    ours, theirs = davis_outline(predicted), davis_outline(true)
    n_ours, n_theirs = int(ours.sum()), int(theirs.sum())
    if not n_ours or not n_theirs:
        return float(n_ours == n_theirs)  # both empty: 1; else precision or recall is 0
    precision = int((edt(~theirs)[ours] <= radius).sum()) / n_ours
    recall = int((edt(~ours)[theirs] <= radius).sum()) / n_theirs
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0
