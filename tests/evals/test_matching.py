"""Matching: a shifted picture is found where it went, to the pixel."""

from __future__ import annotations

import numpy as np

from densedino.evals.matching import match_points
from densedino.evals.tokens import TokenMap


def test_a_shift_is_found() -> None:
    rng = np.random.default_rng(0)
    wide = rng.normal(size=(8, 12, 16)).astype(np.float16)

    def part(left: int) -> TokenMap:
        return TokenMap(wide[:, left : left + 8], source_size=(128, 128), input_size=(128, 128), stride=16)

    points = np.array([[56.0, 40.0], [72.0, 120.0]])  # centres of patches
    found = match_points(part(0), part(2), points)
    np.testing.assert_allclose(found, points - [32, 0])


def test_between_patches_the_feature_is_interpolated() -> None:
    array = np.zeros((2, 2, 2), np.float16)
    array[:, 0], array[:, 1] = [1, 0], [0, 1]
    tokens = TokenMap(array, source_size=(32, 32), input_size=(32, 32), stride=16)
    found = match_points(tokens, tokens, np.array([[15.0, 8.0], [17.0, 8.0], [0.0, 0.0]]))
    np.testing.assert_allclose(found, [[8, 8], [24, 8], [8, 8]])
