"""Owns the layout of a scene's store and writing it: a row per block of patches, a commit per row of blocks.

Blocks are those of `images.tiling.TilePlan`: each lies wholly in one tile, together they are the grid, without overlap.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import filelock
import lance
import numpy as np
import pyarrow as pa

from densedino.errors import StoreError
from densedino.features.layout import METADATA_KEY
from densedino.features.sinks import check_ours
from densedino.features.store import open_lance, read_metadata, reading

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

__all__ = ["Block", "SceneSink", "check_same_scene", "scene_schema"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Block:
    """Some patches of a scene: those of one row of its store."""

    tile: tuple[int, int]
    """Row and column among the tiles."""
    origin: tuple[int, int]
    """Row and column of the first patch in the scene's grid."""
    patches: NDArray[np.float16]
    """[h, w, D], blended; zeros where no tile had a real pixel."""
    valid: NDArray[np.bool_]
    """[h, w]: True where every pixel of the patch is real."""
    cls: NDArray[np.float16]
    """[D] of the tile that holds the block."""


def scene_schema(metadata: Mapping[str, Any]) -> pa.Schema:
    """Columns of a scene's store (see `SceneStore`)."""
    vector = pa.list_(pa.float16(), metadata["embed_dim"])
    columns = [
        *((name, pa.int32()) for name in ("tile_row", "tile_col", "row", "col", "grid_h", "grid_w")),
        ("x", pa.float64()),
        ("y", pa.float64()),
        ("cls", vector),
        ("patches", pa.list_(vector)),
        ("valid", pa.binary()),
    ]
    return pa.schema(columns, metadata={METADATA_KEY: json.dumps(metadata, sort_keys=True)})


def _table(blocks: Sequence[Block], schema: pa.Schema, affine: Sequence[float]) -> pa.Table:
    dim = blocks[0].patches.shape[-1]
    counts = [block.patches.shape[0] * block.patches.shape[1] for block in blocks]
    values = pa.array(np.concatenate([block.patches.reshape(-1) for block in blocks]))
    rows = np.array([block.origin[0] + block.patches.shape[0] / 2 for block in blocks])
    cols = np.array([block.origin[1] + block.patches.shape[1] / 2 for block in blocks])
    a, b, c, d, e, f = affine
    columns: dict[str, Any] = {
        "tile_row": [block.tile[0] for block in blocks],
        "tile_col": [block.tile[1] for block in blocks],
        "row": [block.origin[0] for block in blocks],
        "col": [block.origin[1] for block in blocks],
        "grid_h": [block.patches.shape[0] for block in blocks],
        "grid_w": [block.patches.shape[1] for block in blocks],
        "x": a * cols + b * rows + c,
        "y": d * cols + e * rows + f,
        "cls": pa.FixedSizeListArray.from_arrays(pa.array(np.concatenate([block.cls for block in blocks])), dim),
        "patches": pa.ListArray.from_arrays(
            pa.array(np.cumsum([0, *counts]), pa.int32()), pa.FixedSizeListArray.from_arrays(values, dim)
        ),
        "valid": [None if block.valid.all() else np.packbits(block.valid).tobytes() for block in blocks],
    }
    arrays = [
        columns[field.name] if isinstance(columns[field.name], pa.Array) else pa.array(columns[field.name], field.type)
        for field in schema
    ]
    return pa.table(arrays, schema=schema)


def check_same_scene(stored: Mapping[str, Any], wanted: Mapping[str, Any], *, path: Path) -> None:
    """Refuse to mix blocks of other numbers.

    Raises:
        StoreError: the metadata differ in what decides the numbers; the message names it.
    """
    if stored["fingerprint"] == wanted["fingerprint"]:
        return
    pairs = [(name, stored[name], wanted[name]) for name in ("model", "precision")]
    pairs += [("weights", stored["weights"]["sha256"][:12], wanted["weights"]["sha256"][:12])]
    for part in ("transform", "scene"):
        names = sorted(stored.get(part, {}).keys() | wanted[part].keys())
        pairs += [(f"{part}.{name}", stored.get(part, {}).get(name), wanted[part].get(name)) for name in names]
    differing = [f"{name} is {_short(old)} there and {_short(new)} now" for name, old, new in pairs if old != new]
    raise StoreError(
        f"{str(path)!r} holds another scene, or this one computed otherwise: {'; '.join(differing[:3])}. "
        "They cannot be mixed. Fix: another output with -o, or the options of that store."
    )


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


class SceneSink:
    """Rows of blocks, each committed once, in any order and by any number of processes."""

    def __init__(self, path: Path, metadata: Mapping[str, Any]) -> None:
        """Open the store at `path`, or make one.

        Raises:
            StoreError: something else stands there, or blocks of other numbers.
        """
        self.path = path
        self._metadata = metadata
        self._schema = scene_schema(metadata)
        exists = any((path / "_versions").glob("*.manifest"))
        if not exists:
            check_ours(path, own={"_versions", "_transactions", "data", ".lock"})
        path.mkdir(parents=True, exist_ok=True)
        self._lock = filelock.FileLock(path / ".lock")
        with self._lock:
            if not any((path / "_versions").glob("*.manifest")):
                self._dataset = lance.write_dataset(self._schema.empty_table(), path)
            else:
                self._dataset = open_lance(path)
                check_same_scene(read_metadata(self._dataset, path=path), metadata, path=path)
        self._read_done()

    def _read_done(self) -> None:
        with reading(self.path):
            self.done: set[int] = set(self._dataset.to_table(columns=["tile_row"])["tile_row"].to_pylist())
        """Rows of tiles whose blocks stand."""

    def append(self, blocks: Sequence[Block]) -> None:
        """Commit the blocks of one row of tiles, if nobody else has.

        Raises:
            StoreError: the disk is full, or access was lost.
        """
        (number,) = {block.tile[0] for block in blocks}
        with self._lock:
            latest = lance.dataset(self.path)
            if latest.version != self._dataset.version:  # another process was here
                self._dataset = latest
                self._read_done()
            if number in self.done:
                return
            table = _table(blocks, self._schema, self._metadata["scene"]["affine"])
            try:
                self._dataset = lance.write_dataset(table, self._dataset, mode="append")
            except (OSError, ValueError, RuntimeError) as error:
                raise StoreError(
                    f"writing to {str(self.path)!r} failed: {error}. What was committed before stands; when there is "
                    "space and access again, run the same command to go on."
                ) from error
            self.done.add(number)
