"""Owns reading the store of a scene: any part of its grid, block by block, and where on the ground a patch lies."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from densedino.errors import InputError, StoreError
from densedino.features.layout import flat, grids_of, valid_of
from densedino.features.scene_sink import Block
from densedino.features.store import open_lance, read_metadata, reading
from densedino.images.transforms import Transform
from densedino.weights.card import WeightsCard

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Sequence

    from numpy.typing import ArrayLike, NDArray

__all__ = ["SceneStore"]

_COLUMNS = ("tile_row", "tile_col", "row", "col", "grid_h", "grid_w", "cls", "patches", "valid")


class SceneStore:
    """Dense features of one scene on disk, to read: a snapshot of what stood there when it was opened.

    The folder is a Lance dataset. A row is a block of the scene's grid of patches: `tile_row` and `tile_col` (which
    block), `row` and `col` (its first patch in the grid), `grid_h` and `grid_w`, `x` and `y` (ground position of its
    centre), `cls` [D] (of the tile that holds the block), `patches` [h * w][D] in rows from the top left, float16, and
    `valid` (bits, the first in the highest; null if all patches are valid). Blocks do not overlap and fill the grid.

    Where patch (i, j) lies. `affine` = (a, b, c, d, e, f) maps places in the grid, in patches from its top left corner,
    to ground coordinates in `crs`: x = a·j + b·i + c, y = d·j + e·i + f. Whole numbers are corners of patches; the
    centre is at (i + ½, j + ½), which is what `xy(i, j)` gives: the ground point of the raster's corner between pixels
    (16i + 7, 16j + 7) and (16i + 8, 16j + 8), in rasterio's words `raster.xy(16 * i + 8, 16 * j + 8, offset="ul")`.
    Scenes without coordinates have crs None and are measured in pixels, y down.

        store = SceneStore("out")
        store.read(rows=(0, 64), cols=(100, 164))      # patches [64, 64, D], valid [64, 64]; reads those blocks only
        store.xy(10, 20); store.index(x, y)            # ground ↔ patch

    Raises:
        StoreError: no store, a damaged one, one of images, or one of a newer densedino.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.dataset = open_lance(self.path)
        self.metadata = read_metadata(self.dataset, path=self.path)
        """Model, weights, transform, precision, fingerprint; and `scene`: source, bands, tiles, coordinates."""
        if "scene" not in self.metadata:
            raise StoreError(f"{str(self.path)!r} holds features of images, not a scene. Open it: dd.FeatureStore(…)")
        scene = self.metadata["scene"]
        self.grid: tuple[int, int] = tuple(scene["grid"])
        """(h, w) in patches."""
        self.stride: int = self.metadata["stride"]
        """Pixels per patch."""
        self.affine: tuple[float, ...] = tuple(scene["affine"])
        self.crs: str | None = scene["crs"]
        """As WKT."""
        self._starts: tuple[Sequence[int], Sequence[int]] = (scene["row_starts"], scene["col_starts"])
        with reading(self.path):
            table = self.dataset.to_table(columns=["tile_row", "tile_col"])
        numbers = zip(table["tile_row"].to_pylist(), table["tile_col"].to_pylist(), strict=True)
        self._rows = {number: row for row, number in enumerate(numbers)}

    @property
    def card(self) -> WeightsCard:
        """The weights that made these features, with their licence."""
        return WeightsCard.from_dict(self.metadata["weights"])

    @property
    def transform(self) -> Transform:
        """What tiles went through, after the scene's bands were scaled to [0, 1]."""
        return Transform(**self.metadata["transform"])

    @property
    def dim(self) -> int:
        """Numbers per patch."""
        return int(self.metadata["embed_dim"])

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of blocks."""
        return len(self._starts[0]), len(self._starts[1])

    @property
    def complete(self) -> bool:
        """Whether every block stands."""
        return len(self) == self.shape[0] * self.shape[1]

    def __len__(self) -> int:
        """Blocks that stand."""
        return len(self._rows)

    def __repr__(self) -> str:
        state = "" if self.complete else f", {len(self):,} of {self.shape[0] * self.shape[1]:,} blocks"
        untrained = ", UNTRAINED" if self.metadata["untrained"] else ""
        return (
            f"SceneStore({str(self.path)!r}, {self.grid[0]}×{self.grid[1]} patches{state}, {self.card.name}{untrained})"
        )

    def xy(self, i: ArrayLike, j: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Ground coordinates (x, y) of the centres of patches (i, j): numbers or arrays."""
        a, b, c, d, e, f = self.affine
        row, col = np.asarray(i, np.float64) + 0.5, np.asarray(j, np.float64) + 0.5
        return a * col + b * row + c, d * col + e * row + f

    def index(self, x: ArrayLike, y: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Patches (i, j) that hold ground points (x, y); outside of the grid the numbers are out of range too."""
        a, b, c, d, e, f = self.affine
        right, down = np.asarray(x, np.float64) - c, np.asarray(y, np.float64) - f
        det = a * e - b * d
        col, row = (e * right - b * down) / det, (a * down - d * right) / det
        return np.floor(row).astype(np.int64), np.floor(col).astype(np.int64)

    def blocks(self, *, rows: tuple[int, int] | None = None, cols: tuple[int, int] | None = None) -> Iterator[Block]:
        """Blocks that stand, in the order of the grid, a row of blocks in memory at a time.

        Args:
            rows: only those with a part in patch rows [first, end).
            cols: only those with a part in patch columns [first, end).

        Raises:
            StoreError: the store cannot be read.
        """
        wanted = [self._within(axis, span) for axis, span in enumerate((rows, cols))]
        for r in wanted[0]:
            standing = [self._rows[r, c] for c in wanted[1] if (r, c) in self._rows]
            if standing:
                yield from self._take(standing)

    def read(
        self, *, rows: tuple[int, int] | None = None, cols: tuple[int, int] | None = None
    ) -> tuple[NDArray[np.float16], NDArray[np.bool_]]:
        """Patches [h, w, D] and `valid` [h, w] of a part of the grid: rows [first, end), columns [first, end).

        Reads only the blocks that have a part in it. Blocks that do not stand yet are zeros and not valid.

        Raises:
            InputError: not a part of the grid.
            StoreError: the store cannot be read.
        """
        (top, bottom), (left, right) = (self._span(axis, span) for axis, span in enumerate((rows, cols)))
        patches = np.zeros((bottom - top, right - left, self.dim), np.float16)
        valid = np.zeros(patches.shape[:2], np.bool_)
        for block in self.blocks(rows=(top, bottom), cols=(left, right)):
            (i, j), (h, w) = block.origin, block.valid.shape
            r0, r1, c0, c1 = max(i, top), min(i + h, bottom), max(j, left), min(j + w, right)
            here = (slice(r0 - top, r1 - top), slice(c0 - left, c1 - left))
            there = (slice(r0 - i, r1 - i), slice(c0 - j, c1 - j))
            patches[here], valid[here] = block.patches[there], block.valid[there]
        return patches, valid

    def count_valid(self) -> int:
        """How many patches are valid, of the blocks that stand."""
        with reading(self.path):
            table = self.dataset.to_table(columns=["grid_h", "grid_w", "valid"])
        grids = zip(table["grid_h"].to_pylist(), table["grid_w"].to_pylist(), strict=True)
        masks = (valid_of(bits, grid) for bits, grid in zip(table["valid"].to_pylist(), grids, strict=True))
        return sum(int(mask.sum()) for mask in masks)

    def sample(self, count: int, *, seed: int = 0) -> NDArray[np.float16]:
        """About `count` valid patches [n, D], spread evenly over the blocks; the same ones on every call.

        Raises:
            StoreError: the store cannot be read.
        """
        share = min(1.0, count / (self.grid[0] * self.grid[1]))
        taken = []
        for block in self.blocks():
            random = np.random.default_rng([seed, *block.tile])
            taken.append(block.patches[block.valid & (random.random(block.valid.shape) < share)])
        return np.concatenate(taken) if taken else np.zeros((0, self.dim), np.float16)

    def _span(self, axis: int, span: tuple[int, int] | None) -> tuple[int, int]:
        first, end = span or (0, self.grid[axis])
        if not 0 <= first < end <= self.grid[axis]:
            what = ("rows", "columns")[axis]
            raise InputError(
                f"patch {what} {first} to {end} are no part of this grid, which has {self.grid[axis]} {what}."
            )
        return first, end

    def _within(self, axis: int, span: tuple[int, int] | None) -> list[int]:
        first, end = self._span(axis, span)
        ends = [*self._starts[axis][1:], self.grid[axis]]
        return [n for n, (a, b) in enumerate(zip(self._starts[axis], ends, strict=True)) if a < end and b > first]

    def _take(self, rows: list[int]) -> Iterator[Block]:
        with reading(self.path):
            table: Any = self.dataset.take(rows, columns=list(_COLUMNS)).combine_chunks()
        grids = list(zip(table["grid_h"].to_pylist(), table["grid_w"].to_pylist(), strict=True))
        patches = grids_of(table["patches"].chunk(0), grids)
        cls = flat(table["cls"].chunk(0)).reshape(len(rows), -1)
        for n, grid in enumerate(grids):
            yield Block(
                tile=(table["tile_row"][n].as_py(), table["tile_col"][n].as_py()),
                origin=(table["row"][n].as_py(), table["col"][n].as_py()),
                patches=patches[n],
                valid=valid_of(table["valid"][n].as_py(), grid),
                cls=cls[n],
            )
