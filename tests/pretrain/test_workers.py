from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from densedino.pretrain.workers import default_workers, one_thread, worker_context


def test_cores_are_shared_by_the_processes_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    assert default_workers() == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert default_workers() == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert default_workers() == 1


def test_one_thread_for_a_while() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(ValueError, match="inside"), one_thread():
            assert torch.get_num_threads() == 1
            raise ValueError("inside")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_workers_are_no_forks() -> None:
    assert worker_context().get_start_method() in ("forkserver", "spawn")


TRAINING = """
import multiprocessing, sys
import numpy as np
from test_loading import STAGE, Loader, open_source, DataConfig

if __name__ == "__main__":
    source = open_source(np.zeros((9, 20, 20, 3), np.uint8))
    for batch in Loader([source], stage=STAGE, seed=0, data=DataConfig(workers=1)):
        print([worker.pid for worker in multiprocessing.active_children()], flush=True)
        sys.stdin.read()
"""


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
def test_workers_do_not_outlive_a_killed_run(tmp_path: Path) -> None:
    (tmp_path / "training.py").write_text(TRAINING)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, str(tmp_path / "training.py")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as run:
        assert run.stdout is not None
        (worker,) = json.loads(run.stdout.readline())
        server = int(Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[1])
        run.kill()
    deadline = time.monotonic() + 60  # the processes of a busy machine end slowly
    while any(is_running(process) for process in (worker, server)):
        assert time.monotonic() < deadline, "the worker or the fork server outlives the run"
        time.sleep(0.05)


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
