"""Owns writing features as single files: one per image, in folders that mirror the keys."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from densedino.checkpoint import atomic_path
from densedino.errors import StoreError
from densedino.features.layout import FOLDER_METADATA, Row, describe
from densedino.features.sinks import Standing, check_ours, check_same
from densedino.features.store import check_format

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from densedino.features.quarantine import Stamp

__all__ = ["FileSink"]


class FileSink:
    """One file per image, in folders that mirror the keys; the arrays have the names of the store's columns."""

    def __init__(self, path: Path, files: Literal["npz", "safetensors"], metadata: Mapping[str, Any]) -> None:
        self.path = path
        self._files = files
        self._metadata = metadata
        description = path / FOLDER_METADATA
        if description.is_file():
            stored = json.loads(description.read_text())
            check_format(stored, path=path)
            if stored["files"] != files:
                raise StoreError(
                    f"{str(path)!r} holds {stored['files']} files, not {files}. Choose another one with -o."
                )
            check_same(stored, metadata, path=path)
            return
        check_ours(path, own={"quarantine.jsonl"})
        with atomic_path(description) as scratch:
            scratch.write_text(json.dumps({**metadata, "files": files}, indent=1, sort_keys=True))

    def __len__(self) -> int:
        return sum(1 for _ in self.path.rglob(f"*.{self._files}"))

    def file(self, key: str) -> Path:
        """Where row `key` stands: below the folder, whatever the key."""
        parts = [part.replace(":", "").replace("\\", "_") for part in key.split("/") if part not in ("", ".")]
        *folders, name = ["__" if part == ".." else part for part in parts]
        return self.path.joinpath(*folders, f"{name}.{self._files}")

    def stamp(self, key: str) -> Stamp | None:
        """See `Sink`."""
        row = self._description(key)
        return (row["source_bytes"], row["source_mtime_ns"]) if row else None

    def standing(self, key: str) -> Standing:
        """See `Sink`."""
        row = self._description(key)
        return Standing((row["source_bytes"], row["source_mtime_ns"]), row["source"], row["source_sha256"])

    def frames(self, video: str) -> tuple[list[str], bool]:
        """See `Sink`."""
        first = self.file(f"{video}#frame=000000")
        start, end = first.name.split("000000")[0], f".{self._files}"
        numbers = sorted(
            item.name[len(start) : -len(end)]
            for item in (first.parent.iterdir() if first.parent.is_dir() else ())
            if item.name.startswith(start) and item.name.endswith(end)
        )
        keys = [f"{video}#frame={number}" for number in numbers]
        return keys, bool(keys) and bool(self._description(keys[-1])["last_frame"])

    def append(self, rows: Sequence[Row]) -> None:
        """Write one file after another, each at once.

        Raises:
            StoreError: the disk is full, or access was lost.
        """
        for row in rows:
            arrays = {"cls": row.cls, "registers": row.registers, "patches": row.patches, "valid": row.valid}
            for layer, (cls, patches) in row.layers.items():
                arrays |= {f"cls_layer{layer}": cls, f"patches_layer{layer}": patches}
            text = json.dumps({**describe(row), "store": self._metadata}, sort_keys=True)
            try:
                with atomic_path(self.file(row.key)) as scratch:
                    self._write(scratch, arrays, text)
            except OSError as error:
                raise StoreError(
                    f"writing below {str(self.path)!r} failed: {error}. What was written before stands; when there is "
                    "space and access again, run the same command to go on."
                ) from error

    def _write(self, scratch: Path, arrays: Mapping[str, NDArray[Any]], text: str) -> None:
        if self._files == "npz":
            with scratch.open("wb") as file:
                np.savez(file, allow_pickle=False, metadata=np.array(text), **arrays)
        else:
            from safetensors.numpy import save_file

            contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
            save_file(contiguous, scratch, metadata={"densedino": text})

    def _description(self, key: str) -> dict[str, Any]:
        """What a file says about its row; {} if there is no such file."""
        path = self.file(key)
        if not path.is_file():
            return {}
        if self._files == "npz":
            with np.load(path, allow_pickle=False) as archive:
                text = str(archive["metadata"])
        else:
            from safetensors import safe_open

            with safe_open(path, framework="np") as archive:
                text = archive.metadata()["densedino"]
        description: dict[str, Any] = json.loads(text)
        return description

    def remove(self, keys: Iterable[str]) -> None:
        """See `Sink`."""
        for key in keys:
            self.file(key).unlink(missing_ok=True)
