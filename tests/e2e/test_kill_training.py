"""The real command, killed with SIGKILL at random moments and started again: weights and metrics end as if never so."""

from __future__ import annotations

import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import densedino as dd

IMAGES = 24
COMMAND = [
    *(sys.executable, "-m", "densedino", "pretrain", "images", "--recipe", "debug", "--steps", "24"),
    *("--set", "snapshots.every=3", "--set", "monitor.log_every=1", "--set", "monitor.look_every=24"),
    *("--set", "monitor.images=16", "--set", "monitor.size=64", "--set", "monitor.tensorboard=false"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures, one of them damaged, and the result of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("kill")
    (folder / "images").mkdir()
    for number in range(IMAGES):
        pixels = np.random.default_rng(number).integers(0, 256, (12, 9, 3), dtype=np.uint8)
        path = folder / "images" / f"{number:02d}.jpg"
        Image.fromarray(pixels).resize((72, 96)).save(path)
    os.truncate(path, 150)
    run = train(folder, "whole")
    assert run.wait(timeout=500) == 0, log(folder)
    return folder


def train(folder: Path, output: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (folder / "log").open("ab") as file:
        return subprocess.Popen([*COMMAND, "-o", output], cwd=folder, env=environment, stdout=file, stderr=file)


def log(folder: Path) -> str:
    return (folder / "log").read_text()[-3000:]


def steps(output: Path) -> list[int]:
    path = output / "metrics.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines() if line.endswith("}")]


def kill_and_resume(folder: Path, output: str, *, kills: int, seed: int) -> int:
    """Kill so many runs at work, and finish; returns how many were killed after their first snapshot."""
    moment = random.Random(seed)
    entries = [json.loads(line) for line in (folder / "whole" / "metrics.jsonl").read_text().splitlines()]
    step_seconds = statistics.median(e["images"] / e["step"] / e["images_per_second"] for e in entries)
    killed = 0
    for _ in range(kills):
        run = train(folder, output)
        path = folder / output / "metrics.jsonl"
        before = path.stat().st_size if path.exists() else 0
        while run.poll() is None and (not path.exists() or path.stat().st_size <= before):
            time.sleep(0.005)  # until it trains
        time.sleep(moment.uniform(0, 2 * step_seconds))
        run.send_signal(signal.SIGKILL)
        killed += run.wait(timeout=60) == -signal.SIGKILL
    run = train(folder, output)
    assert run.wait(timeout=500) == 0, log(folder)
    return killed


def assert_equal_runs(one: Path, other: Path) -> None:
    last = Path("snapshots") / max(path.name for path in (one / "snapshots").iterdir())
    for name in (Path("model.safetensors"), last / "model.safetensors", last / "optimizer.safetensors"):
        mine, theirs = load_file(one / name), load_file(other / name)
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            assert torch.equal(value, theirs[key]), f"{name}: {key}"
    assert steps(one) == steps(other) == list(range(1, 25))
    for mine, theirs in zip(*((run / "metrics.jsonl").read_text().splitlines() for run in (one, other)), strict=True):
        timed = {"images_per_second": 0}
        assert json.loads(mine) | timed == json.loads(theirs) | timed
    assert (one / "quarantine.jsonl").read_text() == (other / "quarantine.jsonl").read_text()


def test_two_kills(folder):
    assert kill_and_resume(folder, "two", kills=2, seed=0) >= 1, "no run was killed at work: the test tests nothing"
    assert_equal_runs(folder / "two", folder / "whole")
    assert not list((folder / "two" / "snapshots").glob("damaged*"))


@pytest.mark.slow
def test_ten_kills(folder):
    assert kill_and_resume(folder, "ten", kills=10, seed=1) >= 5
    assert_equal_runs(folder / "ten", folder / "whole")


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_ends_it_with_a_snapshot_and_it_goes_on(folder, number):
    output = folder / signal.Signals(number).name
    run = train(folder, output.name)
    while run.poll() is None and not (output / "metrics.jsonl").exists():
        time.sleep(0.01)
    while run.poll() is None and len(steps(output)) < 6:
        time.sleep(0.01)
    run.send_signal(number)
    assert run.wait(timeout=500) == 130, log(folder)
    assert "Run the same command again to go on." in log(folder)
    done = steps(output)[-1]
    assert (output / "snapshots" / f"step-{done:08d}").is_dir()
    assert not (output / "model.safetensors").exists()
    run = train(folder, output.name)
    assert run.wait(timeout=500) == 0, log(folder)
    assert_equal_runs(output, folder / "whole")


def test_the_result_loads_and_a_finished_run_stays_as_it_is(folder):
    dino = dd.load(weights=folder / "whole" / "model.safetensors")
    assert dino.card.model == "debug_vit"
    assert dino.card.data == f"images ({IMAGES} pictures)"
    assert not dino.card.untrained
    assert dino(folder / "images" / "00.jpg").patches.shape[-1] == 32
    before = (folder / "whole" / "model.safetensors").read_bytes()
    run = train(folder, "whole")
    assert run.wait(timeout=500) == 0, log(folder)
    assert (folder / "whole" / "model.safetensors").read_bytes() == before
