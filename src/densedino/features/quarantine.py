"""Owns the report of inputs that gave no features: which, why, and whether to try them again."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from densedino.checkpoint import atomic_path

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

__all__ = ["Entry", "Quarantine", "Stamp", "stamp_of"]

Stamp = tuple[int, int]
"""Size in bytes and time of the last change in nanoseconds: if both are the same, so is the file."""


def stamp_of(status: os.stat_result) -> Stamp:
    """The stamp of a file."""
    return status.st_size, status.st_mtime_ns


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One input without features."""

    key: str
    path: str
    reason: str
    size: int | None
    """Of the file, in bytes; None if it was not there."""
    mtime_ns: int | None

    @property
    def stamp(self) -> Stamp | None:
        """What the file was when it failed."""
        return None if self.size is None or self.mtime_ns is None else (self.size, self.mtime_ns)


class Quarantine:
    """`quarantine.jsonl` in the output folder: one JSON object per line, appended as inputs fail."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[str, Entry] = {}
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
            try:
                entry = Entry(**json.loads(line))
            except (ValueError, TypeError):  # the last line of a process that was killed while it wrote
                continue
            self.entries[entry.key] = entry

    def holds(self, key: str, stamp: Stamp | None) -> bool:
        """Whether that input failed before and its file is the same still."""
        return key in self.entries and self.entries[key].stamp == stamp

    def add(self, entries: Iterable[Entry]) -> None:
        """Append; on disk when this returns."""
        added = list(entries)
        if not added:
            return
        self.entries.update((entry.key, entry) for entry in added)
        lines = "".join(json.dumps(asdict(entry)) + "\n" for entry in added)
        with self.path.open("a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                lines = lines if file.read(1) == b"\n" else "\n" + lines  # after a line that was cut off
            file.write(lines.encode())  # one write: lines of two processes do not mix
            file.flush()
            os.fsync(file.fileno())

    def forget(self, keys: Iterable[str]) -> None:
        """Take inputs out that are to be tried again, or that have features now."""
        gone = [key for key in keys if self.entries.pop(key, None) is not None]
        if not gone:
            return
        with atomic_path(self.path) as scratch:
            scratch.write_text("".join(json.dumps(asdict(entry)) + "\n" for entry in self.entries.values()))
