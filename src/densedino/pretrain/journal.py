"""Owns metrics.jsonl: a line for every step that is logged, none lost and none doubled however often a run resumes."""

from __future__ import annotations

import json
import math
import os
from typing import TYPE_CHECKING, Any

from densedino.checkpoint import atomic_path
from densedino.distributed import rank

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__all__ = ["Journal"]


class Journal:
    """Appends to a JSONL file; process 0 alone writes.

    Args:
        path: of the file.
        step: where the run goes on. Lines of later steps, written by a process that was killed before its next
            snapshot, are removed: those steps are taken again.
    """

    def __init__(self, path: Path, *, step: int) -> None:
        self._file = None
        if rank() == 0:
            _rewind(path, step)
            self._file = path.open("a", encoding="utf-8")

    def write(self, entry: Mapping[str, Any]) -> None:
        """Append one line; numbers that JSON has not are written as null."""
        if self._file is not None:
            self._file.write(json.dumps(_plain(entry), allow_nan=False) + "\n")
            self._file.flush()

    def sync(self) -> None:
        """Return when all lines are on the disk: before a snapshot says that they need not be written again."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def _rewind(path: Path, step: int) -> None:
    """Keep the whole lines of steps up to `step`."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        return
    before = path.read_text(encoding="utf-8", errors="replace").splitlines()
    kept = [line for line in before if _step(line) <= step]
    if len(kept) < len(before) or not path.read_bytes().endswith(b"\n"):
        with atomic_path(path) as scratch:
            scratch.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")


def _step(line: str) -> float:
    """The step of a line; infinite where a line is only half there."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
