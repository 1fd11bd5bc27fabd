"""Boundaries against brute force over all pixels and classes, and DAVIS against its dilations."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import binary_dilation, gaussian_filter

from densedino.errors import InputError
from densedino.evals.boundary import (
    boundary_f_of,
    boundary_tolerance,
    count_boundaries,
    davis_f,
    davis_j,
    davis_outline,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray


def disk(radius: int) -> NDArray[np.bool_]:
    y, x = np.ogrid[-radius : radius + 1, -radius : radius + 1]
    return x * x + y * y <= radius * radius


def blobs(rng: np.random.Generator, shape: tuple[int, int], classes: int, smooth: float) -> NDArray[np.int64]:
    noise = np.stack([gaussian_filter(rng.normal(size=shape), smooth) for _ in range(classes)])
    return noise.argmax(0)


def plain(predicted: NDArray, true: NDArray, *, classes: int, ignore: int, radius: int) -> dict[str, list[int]]:
    """Class by class, with dilations."""
    real = true != ignore
    counts: dict[str, list[int]] = {}
    for c in range(classes):
        edges = []
        for labels in (predicted, true):
            edge = np.zeros(labels.shape, bool)
            for y, x in zip(*np.nonzero(real & (labels == c)), strict=True):
                for v, u in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                    inside = 0 <= v < labels.shape[0] and 0 <= u < labels.shape[1]
                    if inside and real[v, u] and labels[v, u] != c:
                        edge[y, x] = True
            edges.append(edge)
        near = [binary_dilation(edge, disk(radius)) for edge in edges]
        for name, mine, others in (("predicted", 0, 1), ("true", 1, 0)):
            counts.setdefault(f"boundary_{name}", []).append(int(edges[mine].sum()))
            counts.setdefault(f"boundary_{name}_near", []).append(int((edges[mine] & near[others]).sum()))
    return counts


@given(seed=st.integers(0, 10**6), radius=st.integers(1, 4), smooth=st.sampled_from([0.3, 1.0, 3.0]))
@settings(max_examples=15, deadline=None)
def test_all_classes_at_once_are_each_class_by_itself(seed: int, radius: int, smooth: float) -> None:
    rng = np.random.default_rng(seed)
    true, predicted = blobs(rng, (24, 31), 5, smooth), blobs(rng, (24, 31), 5, smooth)
    true[blobs(rng, (24, 31), 4, 2.0) == 0] = 255
    ours = count_boundaries(predicted, true, num_classes=6, ignore=255, tolerance=radius)
    theirs = plain(predicted, true, classes=6, ignore=255, radius=radius)
    assert {name: value.tolist() for name, value in ours.items()} == theirs


def test_f_is_100_for_equal_maps_and_for_a_shift_within_the_tolerance() -> None:
    true = np.zeros((40, 40), int)
    true[10:30, 10:30] = 1
    assert boundary_f_of(count_boundaries(true, true, num_classes=3)) == {"boundary_f": 100.0}
    moved = np.roll(true, 2, axis=1)
    assert boundary_f_of(count_boundaries(moved, true, num_classes=3, tolerance=2))["boundary_f"] == 100.0
    assert boundary_f_of(count_boundaries(moved, true, num_classes=3, tolerance=1))["boundary_f"] < 80
    flat = count_boundaries(np.zeros_like(true), np.zeros_like(true), num_classes=3)
    assert math.isnan(boundary_f_of(flat)["boundary_f"])
    with pytest.raises(InputError, match="differ in shape"):
        count_boundaries(true, true[:3], num_classes=3)


def official_f(predicted: NDArray, true: NDArray) -> float:
    """DAVIS's F as it is written down: outlines, dilation by a disk, precision and recall."""
    radius = math.ceil(0.008 * math.hypot(*true.shape))
    ours, theirs = outline(predicted), outline(true)
    matched_theirs = (theirs & binary_dilation(ours, disk(radius))).sum()
    matched_ours = (ours & binary_dilation(theirs, disk(radius))).sum()
    if not ours.sum() or not theirs.sum():
        return float(ours.sum() == theirs.sum())
    precision, recall = matched_ours / ours.sum(), matched_theirs / theirs.sum()
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def outline(mask: NDArray) -> NDArray:
    height, width = mask.shape
    edge = np.zeros_like(mask)
    for y in range(height):
        for x in range(width):
            right = x + 1 < width and mask[y, x] != mask[y, x + 1]
            below = y + 1 < height and mask[y, x] != mask[y + 1, x]
            corner = x + 1 < width and y + 1 < height and mask[y, x] != mask[y + 1, x + 1]
            edge[y, x] = right or below or corner
    return edge


@given(seed=st.integers(0, 10**6))
@settings(max_examples=10, deadline=None)
def test_davis_is_its_definition(seed: int) -> None:
    rng = np.random.default_rng(seed)
    predicted, true = (blobs(rng, (90, 130), 2, 4.0) == 1 for _ in range(2))
    np.testing.assert_array_equal(davis_outline(true), outline(true))
    assert davis_f(predicted, true) == pytest.approx(official_f(predicted, true), abs=1e-12)
    assert davis_j(predicted, true) == (predicted & true).sum() / (predicted | true).sum()


def test_davis_of_empty_masks() -> None:
    empty, full = np.zeros((20, 20), bool), np.zeros((20, 20), bool)
    full[5:9, 5:9] = True
    assert davis_j(empty, empty) == davis_f(empty, empty) == 1
    assert davis_j(empty, full) == davis_f(empty, full) == davis_f(full, empty) == 0


def test_the_tolerance_follows_the_diagonal() -> None:
    assert boundary_tolerance((250, 400)) == 4
