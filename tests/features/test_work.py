"""Chunks of jobs as Ray's workers get them: each is committed once, whoever does it, and failures come back."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

import densedino as dd
from densedino.errors import InputError
from densedino.features.extract import extract
from densedino.features.work import RayExtraction


class Here:
    """Stands where Ray does: every task twice, as after a worker that died before it could answer."""

    def run(self, tasks, worker, *, arguments, gpu):
        assert not gpu
        made = worker(**arguments)
        for task in tasks:
            made({"task": task})
            yield worker(**arguments)({"task": task})


@pytest.fixture
def same(tiny, monkeypatch):
    """A loader of the fixture's model, whose blocks are not those of a fresh one."""
    return partial(lambda: tiny)


def test_tasks_done_twice_stand_once_and_are_those_of_one_process(tiny, images, tmp_path, small_segments, same):
    small_segments(segment_images=3)
    (tmp_path / "images" / "bad.png").write_bytes(b"no picture")
    alone = extract(tiny, [images], output=tmp_path / "alone")
    spread = extract(tiny, [images], output=tmp_path / "spread", runner=RayExtraction(Here(), same))
    assert alone.total == spread.total == 12
    a, b = dd.FeatureStore(tmp_path / "alone"), dd.FeatureStore(tmp_path / "spread")
    assert sorted(a.keys()) == sorted(b.keys()) and len(set(b.keys())) == 12
    for key in a.keys():  # noqa: SIM118 (iterating gives features)
        np.testing.assert_array_equal(a.numpy(key), b.numpy(key))
        assert a.source(key) == b.source(key)
    assert [entry.key for entry in spread.quarantined] == ["images/bad.png"]
    again = extract(tiny, [images], output=tmp_path / "spread", runner=RayExtraction(Here(), same))
    assert again.rows == 0 and again.plan.held == 1


def test_a_worker_with_other_weights_refuses(tiny, images, tmp_path):
    other = partial(dd.load, "debug_vit", weights="random", precision="bf16")
    with pytest.raises(InputError, match="same weights on every machine"):
        extract(tiny, [images], output=tmp_path / "f", runner=RayExtraction(Here(), other))


def test_single_files_are_written_by_one_process(tiny, images, tmp_path, same):
    with pytest.raises(InputError, match="one process"):
        extract(tiny, [images], output=tmp_path / "f", files="npz", runner=RayExtraction(Here(), same))
