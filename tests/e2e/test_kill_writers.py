"""Whoever writes weights or graphs and is killed on the way leaves no file, and the next one writes it."""

from __future__ import annotations

import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

import densedino as dd

if TYPE_CHECKING:
    from pathlib import Path

# Killed when all bytes are written and nothing is renamed yet: the last moment at which a half file could be seen.
KILLED = """
import os, sys
rename = os.replace
def replace(source, target, *rest, **named):
    if os.fspath(target) == {target!r}:
        os.kill(os.getpid(), 9)
    return rename(source, target, *rest, **named)
os.replace = replace
from densedino.cli.main import main
sys.exit(main(sys.argv[1:]))
"""
WRITERS = {
    "quantize": "quantize debug_vit --weights random --calibrate photos --size 32 -o x.safetensors",
    "prune": "prune debug_vit --weights random --calibrate photos --size 32 --keep 0.8 --minutes 0 -o x.safetensors",
    "onnx": "export debug_vit --weights random --to onnx -o x.onnx",
    "openvino": "export debug_vit --weights random --to openvino -o x.xml",
    "torch": "export debug_vit --weights random --to torch -o x.pt2",
    "hf": "export debug_vit --weights random --to safetensors-hf -o x",
}


def run(folder: Path, code: str, command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *command.split()], cwd=folder, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("writer", WRITERS)
def test_a_killed_writer_leaves_nothing_that_is_taken_for_whole(tmp_path: Path, writer: str) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for i in range(9):
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(tmp_path / "photos" / f"{i}.png")
    command = WRITERS[writer]
    name = command.rpartition(" ")[2]
    killed = run(tmp_path, KILLED.format(target=name), command)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    left = [path.name for path in tmp_path.iterdir() if path.name != "photos"]
    beside = {"x.bin"}  # OpenVINO's weights, whole, which nothing reads without the .xml
    assert left and all(entry.startswith(".") and entry.endswith(".tmp") for entry in {*left} - beside), left
    assert not (tmp_path / name).exists()
    whole = run(tmp_path, "import sys; from densedino.cli.main import main; sys.exit(main(sys.argv[1:]))", command)
    assert whole.returncode == 0, whole.stderr
    assert (tmp_path / name).exists()
    if name.endswith(".safetensors"):
        assert dd.load(weights=tmp_path / name).model.embed_dim == 32
