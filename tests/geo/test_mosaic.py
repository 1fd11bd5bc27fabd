from __future__ import annotations

import numpy as np
import pytest
import torch

from densedino.errors import InputError
from densedino.geo.bands import choose_bands
from densedino.geo.mosaic import Mosaic, Reader, tiles_in_context
from densedino.geo.radiometry import make_scaling
from densedino.geo.raster import Scene
from densedino.images.tiling import TilePlan

PLAN = TilePlan.make((320, 400), tile=128, overlap=48)


@pytest.fixture
def open_reader(tiny, write_raster):
    """A function: a reader of [C, H, W]."""
    opened = []

    def make(array, **options):
        scene = Scene([write_raster(array, **options)])
        opened.append(scene)
        chosen = choose_bands(scene.bands)
        return Reader(scene, chosen, make_scaling(scene, chosen), tiny)

    yield make
    for scene in opened:
        scene.close()


def assembled(plan, rows):
    blocks = [block for row in rows for block in row]
    out = np.zeros((*plan.grid, blocks[0].patches.shape[-1]), np.float32)
    for block in blocks:
        (i, j), (h, w) = block.origin, block.valid.shape
        out[i : i + h, j : j + w] = block.patches
    return out


def by_place(dim):
    """Tokens that say where they are in the scene, as a model without seams would give them."""

    def run(prepared, places):
        out = []
        for one, (top, left) in zip(prepared, places, strict=True):
            i, j = np.mgrid[: one.valid.shape[0], : one.valid.shape[1]]
            tokens = np.stack([i + top, j + left] + [np.ones_like(i)] * (dim - 2), -1)
            out.append(torch.from_numpy(tokens).float())
        return torch.stack(out), torch.zeros(len(out), dim)

    return run


def test_tokens_that_agree_are_not_changed_by_blending(tiny, open_reader, picture) -> None:
    reader = open_reader(picture(320, 400))
    mosaic = Mosaic(tiny, reader, PLAN, run=by_place(tiny.model.embed_dim))
    tokens = assembled(PLAN, mosaic.rows(range(PLAN.shape[0])))
    i, j = np.mgrid[: PLAN.grid[0], : PLAN.grid[1]]
    np.testing.assert_allclose(tokens[..., 0], i, atol=1e-2)
    np.testing.assert_allclose(tokens[..., 1], j, atol=2e-2)  # float16


def test_one_tile_is_what_the_model_gives_of_the_picture(tiny, open_reader, picture) -> None:
    array = picture(100, 120)
    plan = TilePlan.make((100, 120), tile=128, overlap=32)
    ((block,),) = Mosaic(tiny, open_reader(array), plan).rows([0])
    features = tiny(array.transpose(1, 2, 0))
    np.testing.assert_array_equal(block.patches, features.patches[0].half().numpy())
    np.testing.assert_array_equal(block.valid, features.valid[0].numpy())
    np.testing.assert_array_equal(block.cls, features.cls[0].half().numpy())


def test_a_row_is_the_same_whoever_runs_it(tiny, open_reader, picture) -> None:
    reader = open_reader(picture(320, 400))
    mosaic = Mosaic(tiny, reader, PLAN)
    together = list(mosaic.rows(range(PLAN.shape[0])))
    for r in (2, 0, PLAN.shape[0] - 1):
        (alone,) = mosaic.rows([r])
        for a, b in zip(together[r], alone, strict=True):
            assert a.origin == b.origin
            np.testing.assert_array_equal(a.patches, b.patches)
            np.testing.assert_array_equal(a.cls, b.cls)
    some = list(mosaic.rows([0, 3]))
    np.testing.assert_array_equal(some[1][1].patches, together[3][1].patches)


def test_tiles_are_counted(tiny, open_reader, picture) -> None:
    done = []
    mosaic = Mosaic(tiny, open_reader(picture(320, 400)), PLAN, run=by_place(32), advance=done.append)
    list(mosaic.rows([1]))
    assert sum(done) == mosaic.cost([1]) == 2 * PLAN.shape[1]


def test_tiles_of_nothing_are_not_run_and_spoil_nothing(tiny, open_reader, picture) -> None:
    array = picture(320, 400).clip(1, 255)
    array[:, :, 200:] = 0
    ran = []
    place = by_place(tiny.model.embed_dim)

    def run(prepared, places):
        ran.extend(places)
        return place(prepared, places)

    rows = list(Mosaic(tiny, open_reader(array, nodata=0), PLAN, run=run).rows(range(PLAN.shape[0])))
    tokens = assembled(PLAN, rows)
    assert {col for _, col in ran} == {start for start in PLAN.col_starts if start * 16 < 200}
    assert (tokens[:, :12, 2] == 1).all() and (tokens[:, 18:] == 0).all()
    valid = np.concatenate([np.concatenate([block.valid for block in row], 1) for row in rows])
    assert valid[:, :12].all() and not valid[:, 12:].any()


def test_a_constant_scene_has_the_tokens_of_a_constant_tile(tiny, open_reader) -> None:
    plan = TilePlan.make((320, 320), tile=128, overlap=64)
    rows = list(Mosaic(tiny, open_reader(np.full((3, 320, 320), 120, np.uint8)), plan).rows(range(plan.shape[0])))
    one = tiny(np.full((128, 128, 3), 120, np.uint8)).patches[0].numpy()
    tokens = assembled(plan, rows)
    low, high = one.min((0, 1)), one.max((0, 1))  # averages of these, so nowhere beyond them
    assert (tokens >= low - 1e-2).all() and (tokens <= high + 1e-2).all()


def test_features_that_do_not_fit_are_refused(tiny, open_reader, picture) -> None:
    def run(prepared, places):
        return torch.full((len(prepared), *PLAN.tile, 32), 1e6), torch.zeros(len(prepared), 32)

    with pytest.raises(InputError, match="do not fit into float16"):
        list(Mosaic(tiny, open_reader(picture(320, 400)), PLAN, run=run).rows([0]))


def test_an_error_in_a_tile_ends_the_run(tiny, open_reader, picture) -> None:
    reader = open_reader(picture(320, 400))

    def failing(window):
        if window[1]:
            raise InputError("no")
        return reader(window)

    with pytest.raises(InputError, match="no"):
        list(Mosaic(tiny, failing, PLAN).rows([0]))


def test_context_brings_tiles_nearer_to_one_piece(tiny, open_reader, picture) -> None:
    array = picture(320, 400)
    reader, whole = open_reader(array), (0, 0, 320, 400)
    one = tiny(array.transpose(1, 2, 0)).patches[0].numpy()

    def distance(context):
        run = tiles_in_context(tiny, reader, PLAN, whole, context=context)
        return np.linalg.norm(assembled(PLAN, Mosaic(tiny, reader, PLAN, run=run).rows(range(PLAN.shape[0]))) - one)

    assert distance(400) < 0.02 * np.linalg.norm(one)
    assert distance(400) < distance(200) < distance(0)


def test_context_is_not_needed_for_one_tile_and_not_negative(tiny, open_reader, picture) -> None:
    reader = open_reader(picture(100, 100))
    plan = TilePlan.make((100, 100), tile=128, overlap=32)
    assert tiles_in_context(tiny, reader, plan, (0, 0, 100, 100), context=64) is None
    with pytest.raises(InputError, match="context is -1"):
        tiles_in_context(tiny, reader, plan, (0, 0, 100, 100), context=-1)
