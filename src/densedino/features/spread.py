"""Owns spreading work over processes: the workers of a Ray cluster, or the ranks that torchrun started.

Neither is ours: Ray Data hands tasks to workers and hands them out again when a worker dies; torchrun starts ranks and
starts them again. What makes both safe is that a task is committed to the store as a whole, by key, once.
"""

from __future__ import annotations

import logging
import os
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from densedino.errors import InputError, require

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    Worker = Callable[[dict[str, Any]], dict[str, Any]]

__all__ = ["RayRunner", "Share", "the_share"]

_STARTS = 3


@dataclass(frozen=True)
class Share:
    """This process's part of work that several processes begin alike."""

    rank: int = 0
    world: int = 1

    def of(self, count: int) -> range:
        """The numbers 0 … count - 1 that are this process's: neighbours, in `world` nearly equal parts."""
        return range(self.rank * count // self.world, (self.rank + 1) * count // self.world)

    def wait(self) -> None:
        """Until all processes are here."""
        if self.world > 1:
            import torch.distributed as dist

            dist.barrier()


@contextmanager
def the_share() -> Iterator[Share]:
    """This process's share under torchrun; all of it without.

    Raises:
        InputError: the environment says that there are several processes, but not how to find them.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Share()
        return
    import torch.distributed as dist

    if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise InputError(f"WORLD_SIZE is {world}, but {missing[0]} is not set. Start with torchrun.")
    dist.init_process_group("gloo")  # it only waits: no tensor is exchanged
    try:
        yield Share(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


@dataclass(frozen=True, kw_only=True)
class RayRunner:
    """Tasks by the workers of a Ray cluster."""

    address: str | None = None
    """Of a running cluster, such as "ray://head:10001" or "auto"; None starts one on this machine."""
    workers: int | None = None
    """At most; as many as the cluster has cores (or GPUs) for, if not given."""

    def slots(self, *, gpu: bool) -> int:
        """How many workers there can be: `workers`, or as many as the cluster has cores (or GPUs) for.

        Raises:
            MissingExtraError: Ray is not installed.
            InputError: the cluster cannot be reached.
        """
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing phones home
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # a task that is handed out again is no error
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        ray = require("ray", extra="scale", purpose="--runner ray")
        if not ray.is_initialized():
            self._connect(ray)
        there = int(ray.cluster_resources().get("GPU" if gpu else "CPU", 0))
        return max(1, min(self.workers or there, there))

    def _connect(self, ray: Any) -> None:
        """Join the cluster; or start one, which on a busy machine takes longer than Ray waits, but not thrice."""
        for left in reversed(range(_STARTS if self.address is None else 1)):
            try:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", message="lance is not fork-safe")  # Ray forks to start programs
                    ray.init(address=self.address, include_dashboard=False, log_to_driver=False, logging_level="error")
                return
            except Exception as error:  # Ray raises that, and others
                ray.shutdown()
                if not left:
                    where = "on this machine" if self.address is None else f"at {self.address!r}"
                    raise InputError(
                        f"no Ray cluster {where}: {error}. Start one: ray start --head; then give --ray-address auto."
                    ) from error

    def run(
        self, tasks: Sequence[Any], worker: Callable[..., Worker], *, arguments: dict[str, Any], gpu: bool
    ) -> Iterator[dict[str, Any]]:
        """What `worker(**arguments)`, made once in each process, returns for {"task": task}; in any order.

        A worker that dies is replaced, and its task is handed out again: tasks must be safe to do twice.

        Raises:
            MissingExtraError: Ray is not installed.
            InputError: the cluster cannot be reached.
        """
        data = require("ray.data", extra="scale", purpose="--runner ray")
        most = max(1, min(self.slots(gpu=gpu), len(tasks)))
        context = data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        done = data.from_items([{"task": task} for task in tasks], override_num_blocks=len(tasks)).map(
            worker,
            fn_constructor_kwargs=arguments,
            compute=data.ActorPoolStrategy(min_size=1, max_size=most),
            **{"num_gpus" if gpu else "num_cpus": 1},
        )
        yield from done.iter_rows()
