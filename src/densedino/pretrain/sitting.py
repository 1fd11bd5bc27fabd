"""Owns what every sitting of a run does, whatever its steps: agree with the run in its folder, stop together, tell."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from densedino.checkpoint import atomic_path
from densedino.distributed import all_reduce, rank, world_size
from densedino.errors import InputError
from densedino.pretrain.snapshots import config_differences

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from densedino.pretrain.loading import Loader
    from densedino.pretrain.settings import DataConfig
    from densedino.pretrain.signals import Stop
    from densedino.pretrain.snapshots import Snapshot
    from densedino.pretrain.sources import Source
    from densedino.pretrain.step import Batch

T = TypeVar("T")

__all__ = ["agree", "first_process", "pictures", "to_stderr", "until_stopped", "write_config"]


def agree(
    output: Path,
    snapshot: Snapshot,
    config: dict[str, Any],
    *,
    sources: Sequence[Source],
    free: tuple[str, ...],
    accept_changes: bool,
    say: Callable[[str], None],
) -> None:
    """See that a snapshot is of this run, and say what has changed since it.

    Raises:
        InputError: the configuration is another one, in more than the `free` fields, and changes are not accepted.
    """
    changes = config_differences(snapshot.config, config, free=free)
    listed = "".join(f"\n  {line}" for line in changes)
    if changes and not accept_changes:
        raise InputError(
            f"{output} holds a run with another configuration:{listed}\nGive another output folder, or the"
            " configuration that it had. To go on all the same: accept_changes=True, or --accept-changes."
        )
    if changes:
        say(f"goes on with another configuration than before:{listed}")
    before, now = snapshot.notes["pictures"], [len(source) for source in sources]
    if before != now:
        say(f"the sources have {now} pictures, and had {before}: they come in another order from here on")


def write_config(output: Path, config: dict[str, Any]) -> None:
    """Write RUN/config.json; process 0 does."""
    if rank() == 0:
        with atomic_path(output / "config.json") as path:
            path.write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def until_stopped(loader: Loader, stop: Stop, *, device: torch.device) -> Iterator[Batch]:
    """The loader's batches, until any process gets a signal: all stop after the same step."""
    batches = iter(loader) if loader.steps else iter(())
    while True:
        if world_size() > 1:
            stop.asked = bool(all_reduce(torch.tensor(float(stop.asked), device=device), op="max"))
        if stop.asked or (batch := next(batches, None)) is None:
            return
        yield batch


def pictures(sources: Sequence[Source], data: DataConfig) -> list[tuple[str, int]]:
    """Name and number of pictures of each source."""
    names = [source.path for source in data.sources] or [type(source).__name__ for source in sources]
    return [(name, len(source)) for name, source in zip(names, sources, strict=True)]


def first_process(call: Callable[[T], None] | None) -> Callable[[T], None]:
    """`call` in process 0; nothing in others, or for None."""
    return call if call is not None and rank() == 0 else _nothing


def to_stderr(line: str) -> None:
    """What a run tells unless somebody else takes it."""
    print(f"densedino: {line}", file=sys.stderr, flush=True)


def _nothing(_: object) -> None:
    pass
