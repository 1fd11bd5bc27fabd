"""The real command under torchrun: two processes with gloo, replicated or sharded, train what one process trains."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from densedino.models.catalog import create_model
from densedino.pretrain.outcome import outcome_card
from densedino.recipes import recipe
from densedino.weights.convert import write_weights

if TYPE_CHECKING:
    from pathlib import Path

COMMAND = [
    *(sys.executable, "-m", "densedino", "pretrain", "images", "--recipe", "debug", "--steps", "9"),
    *("--batch-size", "8", "--workers", "0", "--set", "snapshots.every=2", "--set", "monitor.log_every=1"),
    *("--set", "monitor.look_every=9", "--set", "monitor.images=8", "--set", "monitor.size=32"),
    *("--set", "monitor.tensorboard=false", "--set", "pretrain.drop_path=0.3"),
    *("--weights", "start.safetensors"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures, weights to start from, and the run of one process.

    In a fresh network LayerScale makes all features alike to the fifth digit, and KoLeo, a logarithm of how they
    differ, magnifies the last bits of a sum, which depend on how a batch is split. So it starts from another.
    """
    folder = tmp_path_factory.mktemp("parallel")
    (folder / "images").mkdir()
    for number in range(12):
        pixels = np.random.default_rng(number).integers(0, 256, (12, 9, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((72, 96)).save(folder / "images" / f"{number:02d}.png")
    torch.manual_seed(0)
    backbone = create_model("debug_vit", device="cpu")
    for block in backbone.blocks:
        torch.nn.init.constant_(block.ls1.gamma, 0.5)
        torch.nn.init.constant_(block.ls2.gamma, 0.5)
    card = outcome_card(recipe("debug"), pictures=[], origin=None)
    write_weights(backbone.state_dict(), folder / "start.safetensors", card=card)
    train(folder, "one")
    return folder


def train(folder: Path, output: str, *options: str, processes: int = 1) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    started = []
    for rank in range(processes):
        torchrun = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
        torchrun |= {"LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        started.append(
            subprocess.Popen(
                [*COMMAND, "-o", output, *options],
                cwd=folder,
                env={**os.environ, "OMP_NUM_THREADS": "1", **(torchrun if processes > 1 else {})},
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    said = [process.communicate(timeout=300)[1] for process in started]
    assert [process.returncode for process in started] == [0] * processes, "\n".join(said)[-5000:]
    assert all(text == "" for text in said[1:]), "process 0 alone speaks"


def losses(output: Path) -> list[float]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [loss for line in lines for loss in line["losses"].values()]


def assert_alike(one: Path, other: Path) -> None:
    torch.testing.assert_close(losses(other), losses(one), rtol=1e-5, atol=1e-6)
    mine, theirs = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    for name, value in mine.items():
        torch.testing.assert_close(theirs[name], value, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("mode", ["replicated", "sharded"])
def test_two_processes_train_as_one(folder, mode):
    options = ["--sharded"] if mode == "sharded" else []
    train(folder, mode, *options, processes=2)
    assert_alike(folder / "one", folder / mode)
    newest = max((folder / mode / "snapshots").iterdir())
    assert (newest / ".metadata").exists() == (mode == "sharded")


@pytest.mark.parametrize(("first", "then"), [("sharded", "one"), ("one", "sharded")])
def test_a_run_goes_on_with_another_number_of_processes(folder, first, then):
    output = f"{first} then {then}"
    how = {"one": ((), 1), "sharded": (("--sharded",), 2)}
    options, processes = how[first]
    train(folder, output, *options, processes=processes)
    (folder / output / "model.safetensors").unlink()
    for snapshot in sorted((folder / output / "snapshots").iterdir())[1:]:  # back to a stage's middle
        subprocess.run(["rm", "-r", snapshot], check=True)
    options, processes = how[then]
    train(folder, output, *options, processes=processes)
    assert_alike(folder / "one", folder / output)
