"""Owns reading a feature store: one image, batches, into NumPy, torch and xarray."""

from __future__ import annotations

import json
import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lance
import numpy as np
import torch

from densedino.engines.eager import LayerTokens
from densedino.errors import DenseDinoError, StoreError, require
from densedino.features.layout import (
    FOLDER_METADATA,
    FORMAT,
    METADATA_KEY,
    column_of,
    flat,
    grids_of,
    valid_of,
)
from densedino.features.tokens import Features
from densedino.images.transforms import Transform
from densedino.weights.card import WeightsCard

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import pyarrow as pa
    from numpy.typing import NDArray

__all__ = ["FeatureStore", "TorchFeatures", "check_format", "open_lance", "read_metadata", "reading"]

_TOKENS = ("cls", "registers", "patches")


def open_lance(path: Path) -> lance.LanceDataset:
    """Open the Lance dataset at `path`.

    Raises:
        StoreError: there is none, or it is damaged.
    """
    if (path / FOLDER_METADATA).is_file():
        raise StoreError(
            f"{str(path)!r} is a folder of single files, not a store. Open each with numpy.load or safetensors, "
            "or extract again without --format."
        )
    if not (path / "_versions").is_dir():
        what = "has no feature store" if path.is_dir() else "does not exist" if not path.exists() else "is a file"
        raise StoreError(f"{str(path)!r} {what}. Make one with: densedino extract IMAGES -o {path}")
    with reading(path):
        return lance.dataset(path)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what Lance and Arrow raise for files that are damaged or gone into a StoreError."""
    try:
        yield
    except DenseDinoError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise StoreError(
            f"the feature store {str(path)!r} cannot be read: {reason}. If it was copied, copy it again, with all its "
            "folders; if it is damaged, extract again into another folder."
        ) from error


def read_metadata(dataset: lance.LanceDataset, *, path: Path) -> dict[str, Any]:
    """The metadata in a store's schema.

    Raises:
        StoreError: a Lance dataset of something else, or of a newer densedino.
    """
    text = (dataset.schema.metadata or {}).get(METADATA_KEY)
    if text is None:
        raise StoreError(f"{str(path)!r} is a Lance dataset, but densedino did not write it. Choose another folder.")
    metadata: dict[str, Any] = json.loads(text)
    check_format(metadata, path=path)
    return metadata


def check_format(metadata: Mapping[str, Any], *, path: Path) -> None:
    """Raise if a newer densedino wrote it.

    Raises:
        StoreError: the format is newer than this version reads.
    """
    if metadata["format"] > FORMAT:
        raise StoreError(
            f"{str(path)!r} was written by densedino {metadata['densedino']} in format {metadata['format']}; "
            f"this version reads up to {FORMAT}. Fix: pip install --upgrade densedino"
        )


class FeatureStore:
    """Dense features on disk, to read: a snapshot of what stood there when it was opened.

    The folder is a Lance dataset, which `lance.dataset(path)`, DuckDB and others open too. A row is an image, or a
    frame of a video: `key` (the path as given), `source` (absolute path) with its `source_sha256`, `source_bytes` and
    `source_mtime_ns`, `frame`, `height` and `width` (pixels of the source), `input_height` and `input_width` (pixels
    that the model saw, without padding), `grid_h` and `grid_w`, `cls` [D], `registers` [R][D], `patches` [h * w][D] in
    rows from the top left, all float16 after the model's final norm, and `valid` (bits of the grid, the first in the
    highest bit; null if all patches are valid). Further layers are `cls_layer5`, `patches_layer5`, without registers.

        store = dd.FeatureStore("features")
        store["photos/cat.jpg"].patches         # Features of one image, float32
        store.numpy("photos/cat.jpg")           # [h, w, D] float16, not copied

    Raises:
        StoreError: no store, a damaged one, or one of a newer densedino.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.dataset = open_lance(self.path)
        self.metadata = read_metadata(self.dataset, path=self.path)
        """Model, weights, transform, precision, fingerprint: all that decided the numbers."""
        if "scene" in self.metadata:
            raise StoreError(f"{str(self.path)!r} holds a scene, not images. Open it: dd.SceneStore({str(path)!r})")
        with reading(self.path):
            self._keys: list[str] = self.dataset.to_table(columns=["key"])["key"].to_pylist()
        self._rows = {key: row for row, key in enumerate(self._keys)}

    @property
    def card(self) -> WeightsCard:
        """The weights that made these features, with their licence."""
        return WeightsCard.from_dict(self.metadata["weights"])

    @property
    def transform(self) -> Transform:
        """What the images went through."""
        return Transform(**self.metadata["transform"])

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, key: object) -> bool:
        return key in self._rows

    def __iter__(self) -> Iterator[Features]:
        return (self[row] for row in range(len(self)))

    def __repr__(self) -> str:
        untrained = ", UNTRAINED" if self.metadata["untrained"] else ""
        return f"FeatureStore({str(self.path)!r}, {len(self):,} images, {self.card.name}{untrained})"

    def keys(self) -> list[str]:
        """All keys, in the order of the rows."""
        return list(self._keys)

    def __getitem__(self, which: str | int) -> Features:
        """Features of one image (B = 1, float32), by key or by number of the row.

        Raises:
            StoreError: no such key.
            IndexError: no such row.
        """
        row = self._row(which)
        layers = self.metadata["layers"]
        names = [f"{name}_layer{layer}" for layer in layers for name in ("cls", "patches")]
        table = self._take(
            row, ["height", "width", "input_height", "input_width", "grid_h", "grid_w", *_TOKENS, "valid", *names]
        )
        one = {name: table[name][0].as_py() for name in ("height", "width", "input_height", "input_width", "valid")}
        grid = (table["grid_h"][0].as_py(), table["grid_w"][0].as_py())
        registers = _tensor(flat(table["registers"].chunk(0))).view(1, -1, self.metadata["embed_dim"])

        def tokens(suffix: str = "") -> LayerTokens:
            patches = _tensor(grids_of(table[f"patches{suffix}"].chunk(0), [grid])[0])[None]
            cls = _tensor(flat(table[f"cls{suffix}"].chunk(0)))[None]
            return LayerTokens(patches, cls, cls.new_zeros(1, 0, cls.shape[1]))  # registers are of the last one only

        last = tokens()
        return Features(
            patches=last.patches,
            cls=last.cls,
            registers=registers,
            valid=torch.from_numpy(valid_of(one["valid"], grid))[None],
            stride=self.metadata["stride"],
            grids=(grid,),
            input_sizes=((one["input_height"], one["input_width"]),),
            source_sizes=((one["height"], one["width"]),),
            layers={layer: tokens(f"_layer{layer}") for layer in layers},
        )

    def source(self, which: str | int) -> str:
        """The file that a row was made of, as an absolute path."""
        return str(self._take(self._row(which), ["source"])["source"][0].as_py())

    def numpy(self, which: str | int) -> NDArray[np.float16]:
        """Patches [h, w, D] of one image, float16, read-only, not copied."""
        table = self._take(self._row(which), ["grid_h", "grid_w", "patches"])
        grid = (table["grid_h"][0].as_py(), table["grid_w"][0].as_py())
        return grids_of(table["patches"].chunk(0), [grid])[0]

    def batches(self, *, columns: Sequence[str] = ("key", "cls"), batch_size: int = 1024) -> Iterator[dict[str, Any]]:
        """Columns of up to `batch_size` rows at a time, in the order of the rows, reading only what is asked for.

        Yields:
            For each column: `cls` [n, D] and numbers [n] as arrays; `patches` as a list of n arrays [h, w, D], `valid`
            as a list of n arrays [h, w], `registers` as one of [R, D]; text as a list of str.

        Raises:
            StoreError: a column that the store does not have.
        """
        if unknown := [name for name in columns if name not in self.dataset.schema.names]:
            raise StoreError(f"no column {unknown[0]!r} in {self}. It has: {', '.join(self.dataset.schema.names)}.")
        read = list(dict.fromkeys([*columns, "grid_h", "grid_w"]))
        with reading(self.path):
            for batch in self.dataset.to_batches(columns=read, batch_size=batch_size):
                grids = list(zip(batch["grid_h"].to_pylist(), batch["grid_w"].to_pylist(), strict=True))
                yield {name: column_of(name, batch[name], grids) for name in columns}

    def torch_dataset(self) -> TorchFeatures:
        """A map-style `torch.utils.data.Dataset` of this store, for a DataLoader with any number of workers.

        Let those be started by `multiprocessing_context="forkserver"` or "spawn": Lance is not safe to fork.
        """
        return TorchFeatures(self.path)

    def xarray(self, which: str | int) -> Any:
        """Patches of one image as an `xarray.DataArray` with dimensions y, x, channel.

        `y` and `x` are the centres of the patches in pixels of the source, measured from its top left corner (the
        centre of the first pixel is 0.5); the coordinate `valid` (y, x) says which patches are real.

        Raises:
            MissingExtraError: xarray is not installed.
        """
        xarray = require("xarray", extra="xarray", purpose="FeatureStore.xarray")
        features = self[which]
        (height, width), (h, w) = features.source_sizes[0], features.grid
        resized = self.transform.geometry(height, width).resized
        y = (np.arange(h) + 0.5) * features.stride * height / resized[0]
        x = (np.arange(w) + 0.5) * features.stride * width / resized[1]
        key = self._keys[self._row(which)]
        return xarray.DataArray(
            self.numpy(which),
            dims=("y", "x", "channel"),
            coords={"y": y, "x": x, "valid": (("y", "x"), features.valid[0].numpy())},
            name="patches",
            attrs={
                "key": key,
                "model": self.metadata["model"],
                "weights": self.card.name,
                "licence": self.card.licence,
                "untrained": self.metadata["untrained"],
                "fingerprint": self.metadata["fingerprint"],
            },
        )

    def _row(self, which: str | int) -> int:
        if isinstance(which, str):
            if which not in self._rows:
                example = f" The first is {self._keys[0]!r}." if self._keys else ""
                raise StoreError(f"no key {which!r} among the {len(self)} of {str(self.path)!r}.{example}")
            return self._rows[which]
        if not -len(self) <= which < len(self):
            raise IndexError(f"row {which} of {len(self)}")
        return which % len(self)

    def _take(self, row: int, columns: list[str]) -> pa.Table:
        with reading(self.path):
            return self.dataset.take([row], columns=columns)


class TorchFeatures(torch.utils.data.Dataset[dict[str, Any]]):
    """Rows as dicts: `key`, `patches` [h, w, D] float16, `cls` [D] float16, `valid` [h, w] bool.

    Each worker process opens the store itself. Images of different sizes do not stack: give the DataLoader a
    `collate_fn`, or batch_size=None.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._length = len(FeatureStore(path))
        self._opened: FeatureStore | None = None
        self._process = 0

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, row: int) -> dict[str, Any]:
        """One row.

        Raises:
            IndexError: no such row.
        """
        store = self._store()
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        table = store._take(row % len(self), ["key", "grid_h", "grid_w", "cls", "patches", "valid"])
        grid = (table["grid_h"][0].as_py(), table["grid_w"][0].as_py())
        return {
            "key": table["key"][0].as_py(),
            "patches": torch.from_numpy(grids_of(table["patches"].chunk(0), [grid])[0].copy()),
            "cls": torch.from_numpy(flat(table["cls"].chunk(0)).copy()),
            "valid": torch.from_numpy(valid_of(table["valid"][0].as_py(), grid)),
        }

    def __getstate__(self) -> dict[str, Any]:
        """Leave the open store behind: it cannot move to another process."""
        return {**self.__dict__, "_opened": None}

    def _store(self) -> FeatureStore:

        if self._opened is None or self._process != os.getpid():  # Lance's threads do not survive a fork
            self._opened, self._process = FeatureStore(self.path), os.getpid()
        return self._opened


def _tensor(array: NDArray[Any]) -> torch.Tensor:
    return torch.from_numpy(array.astype(np.float32))
