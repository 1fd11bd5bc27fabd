"""Runs of rows as Ray's workers get them: each block is committed once, and all are those of one process."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import densedino as dd
from densedino.errors import InputError
from densedino.features.scenes import SceneStore
from densedino.geo.extraction import SceneOptions, extract_scene
from densedino.geo.ray_scene import RayScene, _runs


class Here:
    """Stands where Ray does: every task twice, as after a worker that died before it could answer."""

    def slots(self, *, gpu):
        return 2

    def run(self, tasks, worker, *, arguments, gpu):
        assert len(tasks) > 1

        def apart(task):  # a thread has GDAL settings of its own, as a process has
            made = worker(**arguments)
            done = made({"task": task})
            made.close()
            return done

        with ThreadPoolExecutor(1) as pool:
            for task in reversed(tasks):
                pool.submit(apart, task).result()
                yield pool.submit(apart, task).result()


@given(rows=st.sets(st.integers(0, 60), min_size=1), count=st.integers(1, 9))
def test_runs_are_all_rows_once_in_neighbours(rows, count):
    runs = _runs(sorted(rows), count)
    assert [row for run in runs for row in run] == sorted(rows)
    assert all(run == list(range(run[0], run[-1] + 1)) and len(run) <= -(-len(rows) // count) for run in runs)


def test_workers_write_the_store_of_one_process(tiny, picture, write_raster, tmp_path):
    path = write_raster(picture(400, 150))
    options = SceneOptions(tile=64, overlap=32)
    extract_scene(tiny, [path], output=tmp_path / "a", options=options, check=False)
    done = []
    runner = RayScene(Here(), lambda: tiny)
    extract_scene(tiny, [path], output=tmp_path / "b", options=options, check=False, runner=runner, advance=done.append)
    a, b = SceneStore(tmp_path / "a"), SceneStore(tmp_path / "b")
    assert b.complete and len(a) == b.dataset.count_rows()
    np.testing.assert_array_equal(a.read()[0], b.read()[0])
    assert sum(done) == a.shape[0] * a.shape[1]


def test_a_worker_with_other_weights_refuses(tiny, picture, write_raster, tmp_path):
    other = partial(dd.load, "debug_vit", weights="random", precision="bf16")
    with pytest.raises(InputError, match="same files"):
        extract_scene(
            tiny,
            [Path(write_raster(picture(300, 64)))],
            output=tmp_path / "b",
            options=SceneOptions(tile=64, overlap=32),
            runner=RayScene(Here(), other),
        )
