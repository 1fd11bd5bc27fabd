"""Owns how far a scene in tiles is from the scene in one piece, and whether the borders of tiles show."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from densedino.geo.mosaic import Mosaic, tiles_in_context
from densedino.images.tiling import TilePlan

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from densedino.features.scene_sink import Block
    from densedino.geo.extraction import SceneJob
    from densedino.images.transforms import Prepared

__all__ = ["SeamCounter", "SeamError", "measure_seam_error"]

_SIDE = 1024  # pixels at most on a side of what is run in one piece: 64 × 64 patches


@dataclass(frozen=True, kw_only=True)
class SeamError:
    """Tokens of tiles against those of the same pixels in one piece."""

    grid: tuple[int, int]
    """(h, w) of what was compared, in patches."""
    whole: bool
    """Whether that was the whole scene, or a part from its middle."""
    mean: float
    """Of the cosines between tokens at one place."""
    low: float
    """Their 5th percentile."""


def measure_seam_error(job: SceneJob) -> SeamError | None:
    """Run the scene, or a part of at most 1024 × 1024 pixels from its middle, in tiles and in one piece.

    None if all of it is one tile, or none of it is real.

    Raises:
        ImageError, InputError: as the run itself.
    """
    plan, stride = job.plan, job.plan.stride
    limit = max(_SIDE, 2 * job.options.tile) // stride
    grid = (min(plan.grid[0], limit), min(plan.grid[1], limit))
    top, left = ((whole - part) // 2 * stride for whole, part in zip(plan.grid, grid, strict=True))
    height, width = (
        min(part * stride, side - first) for part, side, first in zip(grid, job.scene.size, (top, left), strict=True)
    )
    window = (top, left, height, width)
    part = TilePlan.make((height, width), tile=job.options.tile, overlap=job.options.overlap, stride=stride)
    whole = job.reader(window)
    if part.shape == (1, 1) or whole is None:
        return None

    def reader(place: tuple[int, int, int, int]) -> Prepared | None:
        return job.reader((place[0] + top, place[1] + left, *place[2:]))

    run = tiles_in_context(job.dino, job.reader, part, window, context=job.options.context)
    blocks = [block for row in Mosaic(job.dino, reader, part, run=run).rows(range(part.shape[0])) for block in row]
    tiled = torch.zeros(*part.grid, job.dino.model.embed_dim)
    for block in blocks:
        (i, j), (h, w) = block.origin, block.valid.shape
        tiled[i : i + h, j : j + w] = torch.from_numpy(block.patches.astype(np.float32))
    one = job.dino.run([whole])
    cosines = F.cosine_similarity(tiled, one.patches[0].cpu(), dim=-1)[whole.valid]
    if not len(cosines):
        return None
    return SeamError(
        grid=part.grid, whole=part.grid == plan.grid, mean=float(cosines.mean()), low=float(cosines.quantile(0.05))
    )


class SeamCounter:
    """Steps between neighbouring patches, where tiles begin and end and elsewhere, over a whole run.

    A step is 1 - cosine of the tokens of two neighbours in a row or column. Where a tile begins or ends, a seam would
    show as longer steps.
    """

    def __init__(self, plan: TilePlan) -> None:
        self._plan = plan
        self._borders = [
            _borders(starts, tile) for starts, tile in zip((plan.row_starts, plan.col_starts), plan.tile, strict=True)
        ]
        self._sums = np.zeros((2, 2))  # [border or not, (sum, count)]
        self._above: NDArray[np.float16] | None = None
        self._above_valid: NDArray[np.bool_] | None = None
        self._next = 0

    def add(self, blocks: Sequence[Block]) -> None:
        """Count the blocks of a row of tiles."""
        tokens = np.concatenate([block.patches for block in blocks], axis=1)
        valid = np.concatenate([block.valid for block in blocks], axis=1)
        top = blocks[0].origin[0]
        self._count(tokens[:, :-1], tokens[:, 1:], valid[:, :-1] & valid[:, 1:], np.arange(1, tokens.shape[1]), axis=1)
        if self._above is not None and self._above_valid is not None and top == self._next:
            tokens, valid = np.concatenate([self._above, tokens]), np.concatenate([self._above_valid, valid])
            top -= 1
        self._count(tokens[:-1], tokens[1:], valid[:-1] & valid[1:], np.arange(top + 1, top + len(tokens)), axis=0)
        self._above, self._above_valid = tokens[-1:], valid[-1:]
        self._next = top + len(tokens)

    def _count(
        self,
        a: NDArray[np.float16],
        b: NDArray[np.float16],
        both: NDArray[np.bool_],
        where: NDArray[np.int64],
        *,
        axis: int,
    ) -> None:
        steps = 1 - F.cosine_similarity(torch.from_numpy(a).float(), torch.from_numpy(b).float(), dim=-1).numpy()
        border = np.isin(where, self._borders[axis])
        border = np.broadcast_to(border[:, None] if axis == 0 else border, both.shape)
        for row, mask in enumerate((both & ~border, both & border)):
            self._sums[row] += steps[mask].sum(dtype=np.float64), mask.sum()

    @property
    def ratio(self) -> float | None:
        """Mean step at borders of tiles ÷ mean step elsewhere; about 1 where no seam shows. None without borders."""
        (inner, many), (border, few) = self._sums
        return None if not few or not many or inner <= 0 else float(border / few / (inner / many))


def _borders(starts: tuple[int, ...], tile: int) -> NDArray[np.int64]:
    """Patches at which a tile begins, or which come right after its end."""
    inner = {*starts[1:], *(start + tile for start in starts[:-1])}
    return np.array(sorted(inner), np.int64)
