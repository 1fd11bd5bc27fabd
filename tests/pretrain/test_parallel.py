"""Two processes against one: gradients, optimizer steps, and snapshots that either can read."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from densedino.errors import InputError
from densedino.pretrain import parallel
from densedino.pretrain.snapshots import find_snapshot, read_snapshot

WORKER = Path(__file__).with_name("parallel_worker.py")


def load_worker():
    spec = importlib.util.spec_from_file_location("parallel_worker", WORKER)
    worker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(worker)
    return worker


def spawn(mode, folder, world=2):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, WORKER, mode, folder],
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            },
        )
        for rank in range(world)
    ]
    assert [p.wait(timeout=120) for p in processes] == [0] * world
    return [torch.load(folder / f"{mode}_{rank}.pt", weights_only=True) for rank in range(world)]


def assert_alike(got, wanted):
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    folder = tmp_path_factory.mktemp("single")
    return load_worker().run("one", folder), folder / "one"


@pytest.mark.parametrize("mode", ["replicated", "sharded", "sharded recompute"])
def test_two_processes_equal_one(mode, single, tmp_path):
    result, snapshots = single
    (tmp_path / "from_one").symlink_to(snapshots)
    for got in spawn(mode, tmp_path):
        assert_alike(got["gradients"], result["gradients"])
        assert_alike(got["state"], result["state"])
        for name, value in result["state"].items():  # of one process, read by two
            assert torch.equal(got["from_one"][name], value)
    worker = load_worker()
    model, optimizer = worker.build(1, "one")  # of two, read by one
    state = worker.training_tensors(model, optimizer)
    snapshot = find_snapshot(tmp_path / mode, announce=pytest.fail)
    assert (snapshot.path / "model.safetensors").exists() == ("sharded" not in mode)
    read_snapshot(snapshot, state)
    for name, value in got["state"].items():
        assert torch.equal(state[name], value), name


@pytest.mark.parametrize("how", ["selective", "full"])
def test_recomputing_changes_no_bit(how, single, tmp_path):
    result, _ = single
    again = load_worker().run(f"recompute {how}", tmp_path)
    for name, value in result["state"].items():
        assert torch.equal(again["state"][name], value), name


def test_names_stay_under_all_wrappers(single):
    result, _ = single
    worker = load_worker()
    model, optimizer = worker.build(0, "recompute")
    assert worker.training_tensors(model, optimizer).keys() == result["state"].keys()


def test_a_device_that_is_not_there_is_named():
    with pytest.raises(InputError, match="device 'cuda:7' is not there"), parallel.processes("cuda:7"):
        pass
    with pytest.raises(InputError, match="device 'gpu' is not there"), parallel.processes("gpu"):
        pass
    with parallel.processes("cpu") as device:
        assert device == torch.device("cpu")


def test_alone_nothing_is_averaged():
    p = torch.nn.Parameter(torch.ones(2))
    p.grad = torch.full((2,), 3.0)
    parallel.average_gradients([p])
    assert p.grad.tolist() == [3.0, 3.0]
    assert parallel.whole(p) is p
