"""Owns the processes that read: how they are started, how many, on how many threads, and that they end with the run."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["default_workers", "end_with_parent", "one_thread", "worker_context"]


def default_workers() -> int:
    """Half of the cores that this process may use, shared with the other processes of this machine; 1 to 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) // 2))


def worker_context() -> Any:
    """How to start fresh processes: one imports PyTorch, the others are forks of that one, which has no threads."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["densedino.pretrain.loading"])
    return context


def end_with_parent(worker: int) -> None:
    """End this worker when the process that trains is gone, even by kill -9.

    PyTorch's workers look whether their parent process lives; that is the fork server, which waits for its workers.
    Until then it reads: an interrupt, which a terminal sends to all, is the training process's to answer.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, name=f"watch of worker {worker}", daemon=True).start()


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread: with several, sums are added in another order, and batches would differ in a bit."""
    before = torch.get_num_threads()
    if before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
