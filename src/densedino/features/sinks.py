"""Owns writing features: the Lance store that any number of processes may append to.

What was appended stands whole, also if the process is killed at any moment.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol

import filelock
import lance
import pyarrow.compute as pc

from densedino.errors import StoreError
from densedino.features.layout import FOLDER_METADATA, Row, store_schema, to_table
from densedino.features.store import open_lance, read_metadata, reading

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence
    from pathlib import Path

    from densedino.features.quarantine import Stamp

__all__ = ["LanceSink", "Sink", "Standing", "check_ours", "check_same"]

_CLEAN_EVERY = 64  # appends; each leaves a manifest behind that lists all files before it
_CLEAN_AFTER = timedelta(seconds=30)  # a reader that is just opening one of them must find it


@dataclass(frozen=True)
class Standing:
    """What is known of a row that stands."""

    stamp: Stamp
    source: str
    sha256: str


class Sink(Protocol):
    """Where rows go."""

    path: Path

    def stamp(self, key: str) -> Stamp | None:
        """The stamp of the file that row `key` was made of; None if there is no such row."""

    def standing(self, key: str) -> Standing:
        """More about a row that stands."""

    def frames(self, video: str) -> tuple[list[str], bool]:
        """Keys of the frames of a video that stand, and whether the last one is among them."""

    def append(self, rows: Sequence[Row]) -> None:
        """Write rows, all or none of them (single files: one after another)."""

    def remove(self, keys: Iterable[str]) -> None:
        """Take rows out."""

    def __len__(self) -> int:
        """How many rows stand."""


def check_ours(path: Path, *, own: Collection[str]) -> None:
    """Refuse to write among somebody's files.

    Raises:
        StoreError: `path` holds anything but `own`.
    """
    if not path.exists():
        return
    if others := [item.name for item in path.iterdir() if item.name not in own and not item.name.endswith(".tmp")]:
        raise StoreError(
            f"{str(path)!r} is not empty and holds no features ({', '.join(sorted(others)[:3])}, …). "
            "Choose a new folder with -o."
        )


def check_same(stored: Mapping[str, Any], wanted: Mapping[str, Any], *, path: Path) -> None:
    """Refuse to mix features of other numbers.

    Raises:
        StoreError: the metadata differ in what decides the numbers; the message names it.
    """
    if stored["fingerprint"] == wanted["fingerprint"]:
        return
    pairs = [(name, stored[name], wanted[name]) for name in ("model", "precision", "layers", "every")]
    pairs += [("weights", stored["weights"]["sha256"][:12], wanted["weights"]["sha256"][:12])]
    names = sorted(stored["transform"].keys() | wanted["transform"].keys())
    pairs += [(f"transform.{name}", stored["transform"].get(name), wanted["transform"].get(name)) for name in names]
    differing = [f"{name} is {old} there and {new} now" for name, old, new in pairs if old != new]
    raise StoreError(
        f"{str(path)!r} holds features of other numbers: {'; '.join(differing) or 'the architecture differs'}. "
        "They cannot be mixed. Fix: another folder with -o, or the options of that store."
    )


class LanceSink:
    """A Lance dataset. Several processes may append at once: none repeats a row that another one has committed."""

    def __init__(self, path: Path, metadata: Mapping[str, Any]) -> None:
        self.path = path
        if not self._exists():
            self._check_free()
        path.mkdir(parents=True, exist_ok=True)
        self._schema = store_schema(metadata)
        self._lock = filelock.FileLock(path / ".lock")
        self._appends = 0
        with self._lock:
            self._dataset = self._create_or_open(metadata)
        self._known: dict[str, Stamp] = {}
        self._frames: dict[str, list[str]] = {}
        self._complete: set[str] = set()
        self._standing: dict[str, Standing] = {}
        self._read_keys()

    def _create_or_open(self, metadata: Mapping[str, Any]) -> lance.LanceDataset:
        if not self._exists():
            return lance.write_dataset(self._schema.empty_table(), self.path)
        dataset = open_lance(self.path)
        check_same(read_metadata(dataset, path=self.path), metadata, path=self.path)
        return dataset

    def _exists(self) -> bool:
        return any((self.path / "_versions").glob("*.manifest"))

    def _check_free(self) -> None:
        """What a process leaves that was killed before its first commit is in nobody's way."""
        if (self.path / FOLDER_METADATA).is_file():
            raise StoreError(f"{str(self.path)!r} is a folder of single files. Choose another one with -o.")
        check_ours(self.path, own={"_versions", "_transactions", "data", "quarantine.jsonl", ".lock"})

    def _read_keys(self) -> None:
        columns = ["key", "source_bytes", "source_mtime_ns", "frame", "last_frame"]
        with reading(self.path):
            table = self._dataset.to_table(columns=columns)
        key, size, mtime = (table[name].to_pylist() for name in columns[:3])
        self._known = dict(zip(key, zip(size, mtime, strict=True), strict=True))
        frames = table.filter(pc.is_valid(table["frame"]))
        self._frames = {}
        for name in frames["key"].to_pylist():
            self._frames.setdefault(name.rpartition("#")[0], []).append(name)
        last = frames.filter(frames["last_frame"])["key"].to_pylist()
        self._complete = {name.rpartition("#")[0] for name in last}

    def __len__(self) -> int:
        return len(self._known)

    def stamp(self, key: str) -> Stamp | None:
        """See `Sink`."""
        return self._known.get(key)

    def standing(self, key: str) -> Standing:
        """See `Sink`."""
        if not self._standing:  # all at once: asked for rarely, but then often for many
            columns = ["key", "source", "source_sha256"]
            with reading(self.path):
                table = self._dataset.to_table(columns=columns)
            for name, source, sha256 in zip(*(table[column].to_pylist() for column in columns), strict=True):
                self._standing[name] = Standing(self._known[name], source, sha256)
        return self._standing[key]

    def frames(self, video: str) -> tuple[list[str], bool]:
        """See `Sink`."""
        return self._frames.get(video, []), video in self._complete

    def append(self, rows: Sequence[Row]) -> None:
        """Commit rows in one step.

        Raises:
            StoreError: the disk is full, or access was lost.
        """
        with self._lock:
            self._refresh()
            new = [row for row in rows if row.key not in self._known]
            if not new:
                return
            try:
                self._dataset = lance.write_dataset(to_table(new, self._schema), self._dataset, mode="append")
            except (OSError, ValueError, RuntimeError) as error:
                raise StoreError(
                    f"writing to {str(self.path)!r} failed: {error}. What was committed before stands; when there is "
                    "space and access again, run the same command to go on."
                ) from error
            self._known.update((row.key, row.stamp) for row in new)
            self._appends += 1
            if self._appends % _CLEAN_EVERY == 0:
                self._dataset.cleanup_old_versions(older_than=_CLEAN_AFTER)

    def remove(self, keys: Iterable[str]) -> None:
        """See `Sink`."""
        gone = list(keys)
        with self._lock:
            self._refresh()
            for start in range(0, len(gone), 1000):
                quoted = ", ".join("'" + key.replace("'", "''") + "'" for key in gone[start : start + 1000])
                self._dataset.delete(f"key IN ({quoted})")
            self._read_keys()

    def _refresh(self) -> None:
        latest = lance.dataset(self.path)
        if latest.version != self._dataset.version:  # another process was here
            self._dataset = latest
            self._read_keys()
