"""An adaptation that is killed at any moment ends in the adapter of one that never was."""

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

if TYPE_CHECKING:
    from pathlib import Path


def command(folder: Path, output: str) -> list[str]:
    options = (
        "--model debug_vit --weights random --tune lora --rank 2 --steps 60 --batch-size 2 --device cpu"
        " --set fit.steps=60 --set fit.every=5 --set fit_together.every=5 --set augment.crop=32"
    )
    return [
        sys.executable,
        "-m",
        "densedino",
        "adapt",
        str(folder / "data"),
        "-o",
        str(folder / output),
        *options.split(),
    ]


@pytest.mark.slow
def test_kill_9_changes_no_bit(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for sub in ("images", "masks"):
        (tmp_path / "data" / sub).mkdir(parents=True)
    for i in range(8):
        image = rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(image).save(tmp_path / "data" / "images" / f"{i}.png")
        Image.fromarray((image[..., 0] > 100).astype(np.uint8)).save(tmp_path / "data" / "masks" / f"{i}.png")
    subprocess.run(command(tmp_path, "whole"), check=True, capture_output=True)
    killed = 0
    for name in ("head.safetensors", "together.safetensors"):
        process = subprocess.Popen(command(tmp_path, "parts"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        watched = tmp_path / "parts" / "work" / name
        before = watched.stat().st_mtime_ns if watched.exists() else 0
        deadline = time.monotonic() + 500
        while process.poll() is None and time.monotonic() < deadline:
            if watched.exists() and watched.stat().st_mtime_ns != before:
                process.send_signal(signal.SIGKILL)
                killed += 1
                break
            time.sleep(0.002)
        process.wait()
    subprocess.run(command(tmp_path, "parts"), check=True, capture_output=True)
    assert killed == 2
    for name in ("head.safetensors", "lora/adapter_model.safetensors"):
        ours, theirs = (load_file(tmp_path / run / name) for run in ("parts", "whole"))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
