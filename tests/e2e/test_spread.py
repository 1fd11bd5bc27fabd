"""Work that several processes share gives the store that one gives, also when a worker is killed in the middle."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage import data

import densedino as dd
from densedino.errors import StoreError
from densedino.features.scenes import SceneStore

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
BIN = Path(sys.executable).parent
TINY = ["--model", "debug_vit", "--weights", "random", "--device", "cpu"]
IMAGES = 400


def environment():
    return os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}"}


def run(*args, folder):
    done = subprocess.run(
        [BIN / "densedino", *args],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures of two sizes, one damaged; a scene; and what one process makes of both."""
    folder = tmp_path_factory.mktemp("spread")
    (folder / "photos").mkdir()
    photo = Image.fromarray(data.chelsea())
    for number in range(IMAGES):
        left, size = number % 90, (128, 96 + 32 * (number % 2))
        photo.crop((left, number % 80, left + size[0], number % 80 + size[1])).save(folder / f"photos/{number:04}.jpg")
    (folder / "photos" / "bad.jpg").write_bytes(b"no picture")
    Image.fromarray(np.tile(data.astronaut(), (4, 2, 1))).save(folder / "scene.png")
    run("extract", "photos", "-o", "alone", *TINY, folder=folder)
    tiles = ["--tile", "256", "--overlap", "64", "--no-check"]
    run("extract", "scene.png", *tiles, "-o", "scene_alone", *TINY, folder=folder)
    return folder


def same_images(one, other):
    a, b = dd.FeatureStore(one), dd.FeatureStore(other)
    assert sorted(a.keys()) == sorted(b.keys()) and len(set(b.keys())) == len(b)
    for key in a.keys():  # noqa: SIM118 (iterating gives features)
        np.testing.assert_array_equal(a.numpy(key), b.numpy(key))
    bad = [
        [json.loads(line)["key"] for line in (store / "quarantine.jsonl").read_text().splitlines()]
        for store in (one, other)
    ]
    assert bad == [["photos/bad.jpg"]] * 2


def same_scene(one, other):
    a, b = SceneStore(one), SceneStore(other)
    assert b.complete and len(a) == len(b) == b.dataset.count_rows()
    np.testing.assert_array_equal(a.read()[0], b.read()[0])


def workers_of(process):
    """Ray's processes that do the map, of this driver alone: its raylet is its child."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            name = (entry / "cmdline").read_bytes().split(b"\0")[0]
        except OSError:
            continue
        if name.startswith(b"ray::") and b"Worker" in name and descends(int(entry.name), process.pid):
            found.append(int(entry.name))
    return found


def descends(pid, ancestor):
    while pid > 1:
        if pid == ancestor:
            return True
        try:
            pid = int((Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            return False
    return False


def rows_of(path):
    try:
        return len(dd.FeatureStore(path))
    except StoreError:
        return 0


def test_a_ray_worker_killed_in_the_middle_loses_nothing_and_doubles_nothing(folder):
    command = [BIN / "densedino", "extract", "photos", "-o", "ray", "--runner", "ray", "--workers", "2", *TINY]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment(), stdout=log, stderr=log)
        deadline = time.monotonic() + 400
        killed = 0
        while process.poll() is None and time.monotonic() < deadline:
            workers = workers_of(process)
            if not killed and workers and 0 < rows_of(folder / "ray") < IMAGES:
                os.kill(workers[0], signal.SIGKILL)
                killed += 1
            time.sleep(0.02)
        assert process.wait(60) == 0, (folder / "log").read_text()
    assert killed == 1, "it was over before it could be killed"
    same_images(folder / "alone", folder / "ray")


def test_ray_on_the_tiles_of_a_scene(folder):
    options = ["--tile", "256", "--overlap", "64", "--no-check", "--runner", "ray", "--workers", "2"]
    run("extract", "scene.png", "-o", "scene_ray", *options, *TINY, folder=folder)
    same_scene(folder / "scene_alone", folder / "scene_ray")


@pytest.mark.parametrize("what", ["images", "scene"])
def test_torchrun(folder, what):
    inputs = {
        "images": ["photos", "-o", "ranks"],
        "scene": ["scene.png", "-o", "scene_ranks", "--tile", "256", "--overlap", "64", "--no-check"],
    }[what]
    command = [BIN / "torchrun", "--nproc-per-node", "2", "--master-port", "29577", "--no-python", BIN / "densedino"]
    done = subprocess.run(
        [*command, "extract", *inputs, *TINY],
        cwd=folder,
        env=environment(),
        capture_output=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr.decode()
    if what == "images":
        same_images(folder / "alone", folder / "ranks")
    else:
        same_scene(folder / "scene_alone", folder / "scene_ranks")
