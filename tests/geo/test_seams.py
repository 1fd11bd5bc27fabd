from __future__ import annotations

import numpy as np
import pytest

from densedino.features.scene_sink import Block
from densedino.geo.extraction import SceneJob, SceneOptions
from densedino.geo.seams import SeamCounter, measure_seam_error
from densedino.images.tiling import TilePlan

PLAN = TilePlan.make((640, 640), tile=160, overlap=32)


def counted(tokens, valid=None, rows=range(PLAN.shape[0])):
    counter = SeamCounter(PLAN)
    valid = np.ones(PLAN.grid, bool) if valid is None else valid
    for r in rows:
        blocks = []
        for c in range(PLAN.shape[1]):
            (top, bottom), (left, right) = PLAN.rows_of(r), PLAN.cols_of(c)
            part = (slice(top, bottom), slice(left, right))
            cls = np.zeros(4, np.float16)
            blocks.append(Block(tile=(r, c), origin=(top, left), patches=tokens[part], valid=valid[part], cls=cls))
        counter.add(blocks)
    return counter.ratio


@pytest.fixture
def noise():
    return np.random.default_rng(0).standard_normal((*PLAN.grid, 4)).astype(np.float16)


def test_noise_has_no_seams(noise) -> None:
    assert counted(noise) == pytest.approx(1, abs=0.05)


def test_a_seam_shows(noise) -> None:
    smooth = np.ones((*PLAN.grid, 4), np.float16) + noise / 100
    jump = smooth.copy()
    jump[:, PLAN.col_starts[1] :, 0] += 1  # what tiles that are cut without blending do
    assert counted(smooth) == pytest.approx(1, abs=0.1)
    assert counted(jump) > 5


def test_what_is_not_valid_does_not_count(noise) -> None:
    valid = np.ones(PLAN.grid, bool)
    noise[:, PLAN.col_starts[1] :] = 0
    valid[:, PLAN.col_starts[1] :] = False
    assert counted(noise, valid) == pytest.approx(1, abs=0.08)


def test_rows_that_do_not_follow_each_other_are_not_compared(noise) -> None:
    smooth = np.ones((*PLAN.grid, 4), np.float16) + noise / 100
    smooth[PLAN.row_starts[3] :] *= -1
    assert counted(smooth) > 5
    assert counted(smooth, rows=(0, 1, 3)) == pytest.approx(1, abs=0.1)


def test_one_tile_has_no_border() -> None:
    plan = TilePlan.make((64, 64), tile=128, overlap=32)
    counter = SeamCounter(plan)
    patches = np.ones((4, 4, 4), np.float16)
    counter.add([Block(tile=(0, 0), origin=(0, 0), patches=patches, valid=np.ones((4, 4), bool), cls=patches[0, 0])])
    assert counter.ratio is None


def test_the_error_of_tiles_is_measured(tiny, write_raster, picture) -> None:
    path = write_raster(picture(200, 260))
    errors = {}
    for context in (0, 256):
        with SceneJob(tiny, [path], SceneOptions(tile=128, overlap=32, context=context)) as job:
            errors[context] = measure_seam_error(job)
    assert errors[0].grid == (13, 17) and errors[0].whole
    assert errors[0].low <= errors[0].mean < errors[256].mean <= 1.0001
    assert errors[256].mean > 0.999


def test_there_is_no_error_of_one_tile_or_of_nothing(tiny, write_raster, picture) -> None:
    with SceneJob(tiny, [write_raster(picture(64, 64))], SceneOptions()) as job:
        assert measure_seam_error(job) is None
    empty = write_raster(np.zeros((3, 200, 200), np.uint8), nodata=0)
    with SceneJob(tiny, [empty], SceneOptions(tile=128, overlap=32)) as job:
        assert measure_seam_error(job) is None
