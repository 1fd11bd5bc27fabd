"""Owns the layout of a feature store: what a row is, its columns, and the way between arrays and Arrow."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from densedino.features.quarantine import Stamp

__all__ = [
    "FOLDER_METADATA",
    "FORMAT",
    "METADATA_KEY",
    "Row",
    "column_of",
    "describe",
    "flat",
    "grids_of",
    "store_schema",
    "to_table",
    "valid_of",
]

FORMAT = 1
"""Raised when older versions of densedino could not read what this one writes."""

FOLDER_METADATA = "densedino.json"
"""The same metadata, in a folder of single files (`--format npz`)."""

METADATA_KEY = b"densedino"


@dataclass(frozen=True, kw_only=True)
class Row:
    """Features of one image or frame, as they are written."""

    key: str
    source: str
    sha256: str
    stamp: Stamp
    frame: int | None
    last_frame: bool | None
    """Whether a frame is the last one of its video: then the video is complete. None for images."""
    source_size: tuple[int, int]
    input_size: tuple[int, int]
    grid: tuple[int, int]
    cls: NDArray[np.float16]
    """[D]."""
    registers: NDArray[np.float16]
    """[R, D]."""
    patches: NDArray[np.float16]
    """[h, w, D]."""
    valid: NDArray[np.bool_]
    """[h, w]."""
    layers: Mapping[int, tuple[NDArray[np.float16], NDArray[np.float16]]]
    """CLS [D] and patches [h, w, D] of further layers."""


def store_schema(metadata: Mapping[str, Any]) -> pa.Schema:
    """Columns of a store with that metadata (see `FeatureStore`)."""

    def vector(dim: int) -> pa.DataType:
        return pa.list_(pa.float16(), dim)  # what Lance can build a vector index on

    def tokens(dim: int) -> pa.DataType:
        return pa.list_(vector(dim))

    dim = metadata["embed_dim"]
    columns: list[tuple[str, pa.DataType]] = [
        ("key", pa.string()),
        ("source", pa.string()),
        ("source_sha256", pa.string()),
        ("source_bytes", pa.int64()),
        ("source_mtime_ns", pa.int64()),
        ("frame", pa.int32()),
        ("last_frame", pa.bool_()),
        *((name, pa.int32()) for name in ("height", "width", "input_height", "input_width", "grid_h", "grid_w")),
        ("cls", vector(dim)),
        ("registers", tokens(dim)),
        ("patches", tokens(dim)),
        ("valid", pa.binary()),
    ]
    for layer, width in zip(metadata["layers"], metadata["layer_dims"], strict=True):
        columns += [(f"cls_layer{layer}", vector(width)), (f"patches_layer{layer}", tokens(width))]
    return pa.schema(columns, metadata={METADATA_KEY: json.dumps(metadata, sort_keys=True)})


def describe(row: Row) -> dict[str, Any]:
    """All of a row but its arrays, under the names of the columns."""
    return {
        "key": row.key,
        "source": row.source,
        "source_sha256": row.sha256,
        "source_bytes": row.stamp[0],
        "source_mtime_ns": row.stamp[1],
        "frame": row.frame,
        "last_frame": row.last_frame,
        "height": row.source_size[0],
        "width": row.source_size[1],
        "input_height": row.input_size[0],
        "input_width": row.input_size[1],
        "grid_h": row.grid[0],
        "grid_w": row.grid[1],
    }


def to_table(rows: Sequence[Row], schema: pa.Schema) -> pa.Table:
    """Rows as a table of `schema`."""

    def tokens(arrays: list[NDArray[np.float16]]) -> pa.Array:
        dim = arrays[0].shape[-1]
        ends = np.cumsum([0, *(array.size // dim for array in arrays)], dtype=np.int32)
        values = pa.array(np.concatenate([array.reshape(-1) for array in arrays]))
        return pa.ListArray.from_arrays(pa.array(ends), pa.FixedSizeListArray.from_arrays(values, dim))

    def vectors(arrays: list[NDArray[np.float16]]) -> pa.Array:
        return pa.FixedSizeListArray.from_arrays(pa.array(np.concatenate(arrays)), len(arrays[0]))

    described = [describe(row) for row in rows]
    columns: dict[str, Any] = {name: [one[name] for one in described] for name in described[0]}
    columns |= {
        "cls": vectors([row.cls for row in rows]),
        "registers": tokens([row.registers for row in rows]),
        "patches": tokens([row.patches for row in rows]),
        "valid": [None if row.valid.all() else np.packbits(row.valid).tobytes() for row in rows],
    }
    for layer in rows[0].layers:
        columns[f"cls_layer{layer}"] = vectors([row.layers[layer][0] for row in rows])
        columns[f"patches_layer{layer}"] = tokens([row.layers[layer][1] for row in rows])
    arrays = [
        columns[field.name] if isinstance(columns[field.name], pa.Array) else pa.array(columns[field.name], field.type)
        for field in schema
    ]
    return pa.table(arrays, schema=schema)


def flat(array: pa.Array) -> NDArray[Any]:
    """All numbers of a (nested) list column, as a read-only view."""
    while pa.types.is_list(array.type) or pa.types.is_fixed_size_list(array.type):
        array = array.flatten()
    return array.to_numpy(zero_copy_only=True)


def grids_of(array: pa.Array, grids: Sequence[tuple[int, int]]) -> list[NDArray[Any]]:
    """Views [h, w, D] of each row; early ConvNeXt stages have a grid that is finer than `grids` by a whole factor."""
    dim = array.type.value_type.list_size
    tokens = flat(array).reshape(-1, dim)
    ends = (array.offsets.to_numpy() - array.offsets[0].as_py())[1:]
    parts = np.split(tokens, ends[:-1])
    out = []
    for part, (h, w) in zip(parts, grids, strict=True):
        finer = round((len(part) / (h * w)) ** 0.5)
        out.append(part.reshape(h * finer, w * finer, dim))
    return out


def valid_of(bits: bytes | None, grid: tuple[int, int]) -> NDArray[np.bool_]:
    """The mask [h, w] that `bits` pack."""
    if bits is None:
        return np.ones(grid, dtype=np.bool_)
    return np.unpackbits(np.frombuffer(bits, np.uint8), count=grid[0] * grid[1]).astype(np.bool_).reshape(grid)


def column_of(name: str, array: pa.Array, grids: Sequence[tuple[int, int]]) -> Any:
    """A column as `FeatureStore.batches` gives it."""
    if name.startswith("patches"):
        return grids_of(array, grids)
    if name.startswith("cls"):
        return flat(array).reshape(len(array), -1)
    if name == "registers":
        return list(flat(array).reshape(len(array), -1, array.type.value_type.list_size))
    if name == "valid":
        return [valid_of(bits, grid) for bits, grid in zip(array.to_pylist(), grids, strict=True)]
    if pa.types.is_string(array.type):
        return array.to_pylist()
    return array.to_numpy(zero_copy_only=False)
