"""A distillation that is killed at any moment ends in the weights of one that never was."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from densedino.models.catalog import create_model
from densedino.weights.convert import write_weights
from densedino.weights.loading import load_weights

if TYPE_CHECKING:
    from pathlib import Path

STEPS = 40


def command(folder: Path, output: str) -> list[str]:
    options = (
        f"--student debug_vit --steps {STEPS} --batch-size 2 --size 32 --workers 0 --device cpu"
        " --set snapshots.every=3 --set calibration=4"
    )
    places = [str(folder / "photos"), "--teacher", str(folder / "t.safetensors"), "-o", str(folder / output)]
    return [sys.executable, "-m", "densedino", "distill", *places, *options.split()]


@pytest.mark.slow
def test_kill_9_changes_no_bit(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for i in range(4):
        Image.fromarray(rng.integers(0, 256, (50, 60, 3), dtype=np.uint8)).save(tmp_path / "photos" / f"{i}.png")
    card = load_weights("debug_vit", weights="random")[1]
    write_weights(create_model("debug_vit").state_dict(), tmp_path / "t.safetensors", card=card)
    subprocess.run(command(tmp_path, "whole"), check=True, capture_output=True)
    killed = 0
    for after in (3, 9, 15, 27):
        process = subprocess.Popen(command(tmp_path, "parts"), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if any(int(p.name.split("-")[1]) >= after for p in (tmp_path / "parts" / "snapshots").glob("step-*")):
                process.send_signal(signal.SIGKILL)
                killed += 1
                break
            time.sleep(0.002)
        process.communicate()
    subprocess.run(command(tmp_path, "parts"), check=True, capture_output=True)
    assert killed >= 2
    ours, theirs = (load_file(tmp_path / name / "debug_vit.safetensors") for name in ("parts", "whole"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
