"""Owns the geometry of tiles: where they lie on the patch grid of a large picture, and with what weight they count.

Pure arithmetic in units of patches. Tiles overlap; where they do, their tokens are averaged with weights that rise
smoothly from a tile's border (raised cosines that sum to 1), so that no tile begins or ends anywhere in the result. The
outermost patches of a tile, which see least of what is around them, count least: the overlap is the halo.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from densedino.errors import ImageError, InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["TilePlan", "tile_starts", "tile_window"]

Size = tuple[int, int]


def tile_starts(grid: int, *, tile: int, step: int) -> tuple[int, ...]:
    """First patches of the tiles along an axis of `grid` patches: `step` apart, the last one moved back to fit.

    One tile, as short as the axis, if the axis is no longer than a tile.
    """
    if grid <= tile:
        return (0,)
    return (*range(0, grid - tile, step), grid - tile)


def tile_window(length: int, *, overlap: int) -> NDArray[np.float32]:
    """Weights [length] of a tile's patches along an axis: rising over `overlap` patches at each end, 1 between.

    sin² of equal steps: two neighbours that share exactly `overlap` patches sum to 1 there.
    """
    inward = np.minimum(np.arange(length), np.arange(length)[::-1]) + 0.5
    return np.square(np.sin(np.pi / 2 * np.minimum(inward / max(overlap, 0.5), 1.0))).astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class TilePlan:
    """Tiles of a picture in rows and columns; all have one size. `TilePlan.make` chooses it.

    The picture is cut into blocks, one per tile: block (r, c) is rows `row_starts[r]` to the next start and columns
    likewise, and lies wholly in tile (r, c). When the tiles of rows 0 … r are done, nothing changes in the blocks of
    row r any more: they can be written.
    """

    size: Size
    """(H, W) of the picture in pixels."""
    stride: int
    """Pixels per patch."""
    tile: Size
    """(h, w) of every tile in patches."""
    overlap: int
    """Patches over which neighbours are blended."""
    row_starts: tuple[int, ...]
    col_starts: tuple[int, ...]

    @classmethod
    def make(cls, size: Size, *, tile: int = 512, overlap: int | None = None, stride: int = 16) -> TilePlan:
        """Plan for a picture of (H, W) pixels; `tile` and `overlap` (a quarter of the tile by default) are in pixels.

        Raises:
            ImageError: the picture has no pixels.
            InputError: a tile or an overlap that is no multiple of the stride, or an overlap as long as a tile.
        """
        if min(size) < 1:
            raise ImageError(f"a picture of {size[0]}×{size[1]} pixels (H×W) has no pixels to cut into tiles.")
        overlap = tile // (4 * stride) * stride if overlap is None else overlap
        for name, value, least in (("tile", tile, stride), ("overlap", overlap, 0)):
            if value % stride or value < least:
                near = max(least, round(value / stride) * stride)
                raise InputError(
                    f"{name} is {value} pixels; it must be a multiple of the patch size {stride}. Nearest: {near}."
                )
        if overlap >= tile:
            raise InputError(
                f"an overlap of {overlap} pixels leaves nothing of a tile of {tile}. Valid: 0 to {tile // 2}."
            )
        grid = (math.ceil(size[0] / stride), math.ceil(size[1] / stride))
        whole, step = tile // stride, (tile - overlap) // stride
        return cls(
            size=size,
            stride=stride,
            tile=(min(whole, grid[0]), min(whole, grid[1])),
            overlap=overlap // stride,
            row_starts=tile_starts(grid[0], tile=whole, step=step),
            col_starts=tile_starts(grid[1], tile=whole, step=step),
        )

    @property
    def grid(self) -> Size:
        """(h, w) of the picture in patches: a partial patch at the bottom or right counts as one."""
        return math.ceil(self.size[0] / self.stride), math.ceil(self.size[1] / self.stride)

    @property
    def shape(self) -> Size:
        """Rows and columns of tiles."""
        return len(self.row_starts), len(self.col_starts)

    def rows_of(self, r: int) -> Size:
        """First patch row of the blocks in row `r`, and the one after their last."""
        return _span(self.row_starts, r, self.grid[0])

    def cols_of(self, c: int) -> Size:
        """First patch column of the blocks in column `c`, and the one after their last."""
        return _span(self.col_starts, c, self.grid[1])

    def first_needed(self, r: int) -> int:
        """The first row of tiles that has a part in the blocks of row `r`."""
        start = self.row_starts[r]
        return next(i for i, first in enumerate(self.row_starts) if first + self.tile[0] > start)

    def pixels_of(self, r: int, c: int) -> tuple[int, int, int, int]:
        """(top, left, height, width) in pixels of tile (r, c), cut off where the picture ends."""
        top, left = self.row_starts[r] * self.stride, self.col_starts[c] * self.stride
        return (
            top,
            left,
            min(self.tile[0] * self.stride, self.size[0] - top),
            min(self.tile[1] * self.stride, self.size[1] - left),
        )

    def weights(self) -> NDArray[np.float32]:
        """Weights [h, w] of a tile's patches, all above 0."""
        rows, cols = (tile_window(n, overlap=self.overlap) for n in self.tile)
        return rows[:, None] * cols


def _span(starts: tuple[int, ...], number: int, end: int) -> Size:
    return starts[number], starts[number + 1] if number + 1 < len(starts) else end
