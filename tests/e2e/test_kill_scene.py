"""The real command on a scene, killed with SIGKILL ten times and started again: the same patches, the same file."""

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

import densedino as dd

if TYPE_CHECKING:
    from pathlib import Path

import rasterio

OPTIONS = ["--tile", "128", "--overlap", "32", "--no-check", "--model", "debug_vit", "--weights", "random"]


def start(folder: Path, output: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "densedino", "extract", "scene.tif", *OPTIONS, "-o", output]
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    with (folder / "log").open("ab") as log:
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)


@pytest.mark.slow
def test_ten_kills_change_nothing(tmp_path) -> None:
    height, width = 1920, 320
    array = np.random.default_rng(0).integers(1, 255, (3, 240, 40), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
    options = {"driver": "GTiff", "count": 3, "height": height, "width": width, "dtype": "uint8", "crs": "EPSG:32632"}
    with rasterio.open(
        tmp_path / "scene.tif", "w", transform=rasterio.Affine(1, 0, 5e5, 0, -1, 5e6), **options
    ) as file:
        file.write(array)
    assert start(tmp_path, "whole").wait(timeout=300) == 0
    moment, between = random.Random(0), 0
    data = tmp_path / "killed" / "data"
    for _ in range(10):
        before = len(list(data.glob("*")))
        with start(tmp_path, "killed") as run:
            while run.poll() is None and len(list(data.glob("*"))) <= before:
                time.sleep(0.002)
            time.sleep(moment.uniform(0, 0.02))  # often in the middle of the next commit
            run.send_signal(signal.SIGKILL)
        between += not dd.SceneStore(tmp_path / "killed").complete
    assert between >= 8, "most kills were to hit a run at work"
    assert start(tmp_path, "killed").wait(timeout=300) == 0, (tmp_path / "log").read_text()[-3000:]
    whole, killed = dd.SceneStore(tmp_path / "whole"), dd.SceneStore(tmp_path / "killed")
    assert killed.complete and killed.dataset.count_rows() == whole.dataset.count_rows()
    for a, b in zip(whole.blocks(), killed.blocks(), strict=True):
        assert a.tile == b.tile
        assert (a.patches.tobytes(), a.cls.tobytes()) == (b.patches.tobytes(), b.cls.tobytes())
    for store in ("whole", "killed"):
        assert start_export(tmp_path, store) == 0
    assert (tmp_path / "whole.tif").read_bytes() == (tmp_path / "killed.tif").read_bytes()


def start_export(folder: Path, store: str) -> int:
    command = [sys.executable, "-m", "densedino", "extract", store, "-o", f"{store}.tif", "--channels", "0,5"]
    return subprocess.run(command, cwd=folder, check=False, timeout=120).returncode
