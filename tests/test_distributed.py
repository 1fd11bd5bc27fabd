"""Two and three processes against one: collectives, and every loss that uses them."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from densedino import distributed

WORKER = Path(__file__).with_name("gloo_worker.py")


def test_without_a_group_nothing_happens():
    x = torch.ones(3, requires_grad=True)
    assert distributed.all_gather(x) is x
    assert distributed.all_reduce(x) is x
    assert (distributed.rank(), distributed.world_size()) == (0, 1)


@pytest.mark.parametrize("world", [2, 3])
def test_processes_together_equal_one(world, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([sys.executable, WORKER, str(rank), str(world), tmp_path], env=environment)
        for rank in range(world)
    ]
    assert [p.wait(timeout=120) for p in processes] == [0] * world
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(world)]

    whole = torch.cat([torch.tensor([[0.0, 2.0], [1.0, 3.0]]) + 10 * rank for rank in range(world)])
    for got in ranks:
        assert torch.equal(got["gathered"], whole)
        assert torch.equal(got["gather_grad"], torch.full((2, 2), sum(range(1, world + 1))))
        assert got["peak"].item() == world - 1

    spec = importlib.util.spec_from_file_location("gloo_worker", WORKER)
    worker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(worker)
    for name, (loss, grads, prototypes) in worker.share(0, 1).items():
        for got in ranks:
            theirs = got["losses"][name]
            torch.testing.assert_close(theirs[0], loss, rtol=1e-6, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")
            torch.testing.assert_close(theirs[1], grads, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
            torch.testing.assert_close(theirs[2], prototypes, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
