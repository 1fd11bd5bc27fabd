from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from densedino.errors import ImageError, InputError
from densedino.images.tiling import TilePlan, tile_starts, tile_window

PLANS = st.builds(
    lambda size, tile, overlap: TilePlan.make(size, tile=16 * tile, overlap=16 * min(overlap, tile - 1)),
    st.tuples(st.integers(1, 700), st.integers(1, 700)),
    st.integers(1, 12),
    st.integers(0, 11),
)


@settings(deadline=None)
@given(PLANS)
def test_every_patch_is_in_one_block_and_every_block_in_its_own_tile(plan: TilePlan) -> None:
    counted = np.zeros(plan.grid, int)
    for r in range(plan.shape[0]):
        for c in range(plan.shape[1]):
            (top, bottom), (left, right) = plan.rows_of(r), plan.cols_of(c)
            assert top < bottom and left < right
            counted[top:bottom, left:right] += 1
            assert plan.row_starts[r] <= top and bottom <= plan.row_starts[r] + plan.tile[0]
            assert plan.col_starts[c] <= left and right <= plan.col_starts[c] + plan.tile[1]
    assert (counted == 1).all()


@settings(deadline=None)
@given(PLANS)
def test_rows_are_finished_when_their_tiles_are(plan: TilePlan) -> None:
    for r in range(plan.shape[0]):
        top, bottom = plan.rows_of(r)
        touching = [i for i, start in enumerate(plan.row_starts) if start < bottom and start + plan.tile[0] > top]
        assert touching == list(range(plan.first_needed(r), r + 1))


@settings(deadline=None)
@given(PLANS)
def test_tiles_end_inside_the_picture_and_are_all_of_one_size(plan: TilePlan) -> None:
    for r in range(plan.shape[0]):
        for c in range(plan.shape[1]):
            top, left, height, width = plan.pixels_of(r, c)
            assert top + height <= plan.size[0] and left + width <= plan.size[1]
            assert (-(-height // 16), -(-width // 16)) == plan.tile
    assert (plan.weights() > 0).all()


@settings(deadline=None)
@given(st.integers(2, 40), st.integers(1, 20))
def test_weights_of_two_neighbours_sum_to_one(tile: int, overlap: int) -> None:
    overlap = min(overlap, tile // 2)
    window = tile_window(tile, overlap=overlap)
    np.testing.assert_allclose(window[:overlap] + window[tile - overlap :], 1.0, atol=1e-6)
    assert (window[overlap : tile - overlap] == 1).all()


def test_the_last_tile_is_moved_back() -> None:
    assert tile_starts(100, tile=32, step=24) == (0, 24, 48, 68)
    assert tile_starts(32, tile=32, step=24) == (0,)
    assert tile_starts(33, tile=32, step=24) == (0, 1)


def test_a_partial_patch_at_the_end_counts() -> None:
    plan = TilePlan.make((1000, 1300), tile=512, overlap=128)
    assert plan.grid == (63, 82)
    assert plan.row_starts == (0, 24, 31) and plan.col_starts == (0, 24, 48, 50)
    assert plan.pixels_of(2, 3) == (31 * 16, 50 * 16, 1000 - 31 * 16, 1300 - 50 * 16)


@pytest.mark.parametrize(
    ("size", "options", "error", "message"),
    [
        ((0, 5), {}, ImageError, "0×5 pixels"),
        (
            (64, 64),
            {"tile": 500},
            InputError,
            "tile is 500 pixels; it must be a multiple of the patch size 16. Nearest: 496",
        ),
        ((64, 64), {"overlap": 8}, InputError, "overlap is 8"),
        ((64, 64), {"overlap": -16}, InputError, "overlap is -16"),
        ((64, 64), {"tile": 128, "overlap": 128}, InputError, "leaves nothing of a tile of 128"),
    ],
)
def test_what_makes_no_sense_is_refused(size, options, error, message) -> None:
    with pytest.raises(error, match=message):
        TilePlan.make(size, **options)
