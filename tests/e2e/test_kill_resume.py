"""The real command, killed with SIGKILL at random moments and started again: the store ends as if never interrupted."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

import densedino as dd
from densedino.errors import StoreError

if TYPE_CHECKING:
    from pathlib import Path

COUNT = 1200
COMMAND = [sys.executable, "-m", "densedino", "extract", "images", "--model", "debug_vit", "--weights", "random"]
SIZES = [(48, 64), (64, 64), (80, 48), (96, 120)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """1,200 pictures of four sizes, some of them damaged, and the store of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("kill")
    (folder / "images").mkdir()
    for number in range(COUNT):
        generator = np.random.default_rng(number)
        height, width = SIZES[number % 4 if number < 600 else 0]
        pixels = generator.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
        path = folder / "images" / f"{number:04d}.jpg"
        Image.fromarray(pixels).resize((width, height)).save(path)
        if number % 97 == 5:
            os.truncate(path, 200)
    start = time.monotonic()
    run = start_extraction(folder, "whole")
    assert run.wait(timeout=300) == 0
    (folder / "seconds").write_text(str(time.monotonic() - start))
    return folder


def start_extraction(folder: Path, output: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}  # the same in every run: two streams
    with (folder / "log").open("ab") as log:
        return subprocess.Popen([*COMMAND, "-o", output], cwd=folder, env=environment, stdout=log, stderr=log)


def rows(path: Path) -> int:
    return len(dd.FeatureStore(path)) if path.is_dir() else 0


def kill_and_resume(folder: Path, output: str, *, kills: int, seed: int) -> int:
    """Kill so many runs, half of them at work; finish; return how many were killed between two commits."""
    moment = random.Random(seed)
    seconds = float((folder / "seconds").read_text())
    store = folder / output
    between = 0
    for number in range(kills):
        run = start_extraction(folder, output)
        if number % 2:
            time.sleep(moment.uniform(0, seconds))
        else:  # wait until it has committed something, then a little
            before = len(list(store.glob("data/*")))
            while run.poll() is None and len(list(store.glob("data/*"))) <= before:
                time.sleep(0.002)
            time.sleep(moment.uniform(0, moment.choice([0.01, 0.1])))  # often in the middle of the commit
        run.send_signal(signal.SIGKILL)
        run.wait(timeout=60)
        try:  # a reader finds a whole store, or none yet
            between += 0 < rows(store) < COUNT - 13
        except StoreError as error:
            assert "has no feature store" in str(error)
    run = start_extraction(folder, output)
    assert run.wait(timeout=300) == 0, (folder / "log").read_text()[-3000:]
    return between


def assert_equal_stores(one: Path, other: Path) -> None:
    first, second = (dd.FeatureStore(path).dataset.to_table() for path in (one, other))
    assert len(first) == COUNT - 13
    assert first.equals(second)  # all columns, in order, bit for bit
    assert first.schema.metadata == second.schema.metadata
    assert (one / "quarantine.jsonl").read_text() == (other / "quarantine.jsonl").read_text()


def test_three_kills(folder):
    between = kill_and_resume(folder, "three", kills=3, seed=0)
    assert between >= 1, "no run was killed at work: the test tests nothing"
    assert_equal_stores(folder / "three", folder / "whole")


@pytest.mark.slow
def test_twenty_kills(folder):
    """20 kills, over several stores, as a store that is complete cannot be interrupted any more."""
    between = sum(kill_and_resume(folder, f"twenty{n}", kills=5, seed=n) for n in range(4))
    assert between >= 4
    for n in range(4):
        assert_equal_stores(folder / f"twenty{n}", folder / "whole")


@pytest.mark.slow
def test_two_at_once_repeat_nothing(folder):
    both = [start_extraction(folder, "both") for _ in range(2)]
    assert [run.wait(timeout=300) for run in both] == [0, 0], (folder / "log").read_text()[-3000:]
    keys = dd.FeatureStore(folder / "both").keys()
    assert len(keys) == COUNT - 13
    assert sorted(keys) == sorted(dd.FeatureStore(folder / "whole").keys())
