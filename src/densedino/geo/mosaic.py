"""Owns running a model over a scene tile by tile: read, run, blend in feature space, give out finished rows of blocks.

In memory are, whatever the scene's height: a few tiles ahead, and the blended tokens of one row of tiles. Tiles are
blended in one order, so that a run that was interrupted goes on to the same bits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from densedino.engines.context import ContextEngine
from densedino.errors import InputError
from densedino.features.planning import Settings
from densedino.features.scene_sink import Block
from densedino.images.decoding import Pixels

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray
    from torch import Tensor

    from densedino.features.extractor import FeatureExtractor
    from densedino.geo.bands import Chosen
    from densedino.geo.radiometry import Scaling
    from densedino.geo.raster import Scene
    from densedino.images.tiling import TilePlan
    from densedino.images.transforms import Prepared

__all__ = ["Mosaic", "Reader", "Run", "tiles_in_context"]

Run = Callable[[Sequence["Prepared"], Sequence[tuple[int, int]]], "tuple[Tensor, Tensor]"]
"""Patches [B, h, w, D] and cls [B, D] of prepared tiles at (row, col) in patches."""


class Reader:
    """Windows of a scene as the model takes them. One thread at a time."""

    def __init__(self, scene: Scene, chosen: Chosen, scaling: Scaling, dino: FeatureExtractor) -> None:
        self.scene, self.chosen, self.scaling = scene, chosen, scaling
        self._transform = replace(dino.transform, resize=None, fit="pad", max_tokens=None)

    def __call__(self, window: tuple[int, int, int, int], *, out: tuple[int, int] | None = None) -> Prepared | None:
        """The pixels of (top, left, height, width), padded to whole patches; None if none of them is real.

        `out` is a size to shrink them to.

        Raises:
            ImageError: the window is smaller than a patch.
        """
        array, valid = self.scene.read(window, bands=self.chosen.places, out=out)
        if not valid.any():
            return None
        values, white = self.scaling.apply(array, valid)
        if values.shape[2] == 1 and self._transform.in_chans == 3:
            values = values.repeat(3, axis=2)
        name = f"the window {window} of {self.scene.sources[0]!r}"
        return self._transform(Pixels(array=values, valid=None if valid.all() else valid, max_value=white, name=name))


def tiles_in_context(
    dino: FeatureExtractor, reader: Reader, plan: TilePlan, window: tuple[int, int, int, int], *, context: int
) -> Run | None:
    """How tiles of `window` (all of the plan) are run, with that window, shrunk to `context` pixels on its longer side.

    None, which is the model alone, if `context` is 0, or there is only one tile, or no pixel is real.

    Raises:
        InputError: `context` is negative, or the model or engine cannot do it.
    """
    if context < 0:
        raise InputError(f"context is {context} pixels; give 512, say, or 0 for tiles that see nothing but themselves.")
    if not context or plan.shape == (1, 1):
        return None
    height, width = window[2:]
    coarse = tuple(
        min(whole, max(1, round(side * context / max(height, width) / plan.stride)))
        for side, whole in zip((height, width), plan.grid, strict=True)
    )
    whole = reader(window, out=(coarse[0] * plan.stride, coarse[1] * plan.stride))
    if whole is None:
        return None
    engine = ContextEngine(dino.engine, whole.pixels[None], grid=plan.grid, real=whole.valid)

    def run(prepared: Sequence[Prepared], places: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        return engine(torch.stack([one.pixels for one in prepared]), places)

    return run


@dataclass
class _Tokens:
    """Of one tile: patches [h, w, D] float32, cls [D] float32, valid [h, w]; None where it has no real pixel."""

    col: int
    patches: Tensor | None
    cls: Tensor | None
    valid: NDArray[np.bool_] | None


class Mosaic:
    """The tiles of a plan, run over a scene.

    Args:
        dino: of `dd.load`.
        reader: of the scene's windows; only one mosaic may use it at a time.
        plan: of the tiles.
        run: how tiles are run; by the model alone if not given.
        advance: called with the number of tiles that were done.
    """

    def __init__(
        self,
        dino: FeatureExtractor,
        reader: Callable[[tuple[int, int, int, int]], Prepared | None],
        plan: TilePlan,
        *,
        run: Run | None = None,
        advance: Callable[[int], None] = lambda count: None,
    ) -> None:
        self._dino, self._reader, self._plan, self._advance = dino, reader, plan, advance
        self._run = run or self._plain
        self._weights = torch.from_numpy(plan.weights())[..., None]
        tiles = plan.shape[0] * plan.shape[1]
        streaming = dino.engine.name == "stream"
        self._settings = Settings.choose(dino.device, inputs=2 * tiles, batch_size=None, streaming=streaming)

    def _plain(self, prepared: Sequence[Prepared], places: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        features = self._dino.run(prepared)
        return features.patches.cpu(), features.cls.cpu()

    def rows(self, wanted: Iterable[int]) -> Iterator[list[Block]]:
        """Blocks of rows of tiles, `wanted` in rising order; before a row that stands alone, those above run too.

        Raises:
            InputError: features that are not finite, or do not fit into float16.
            ImageError: tiles that cannot be read at all.
        """
        before = torch.get_num_threads()
        torch.set_num_threads(self._settings.threads)
        try:
            with _pools(self._settings) as pools:
                yield from self._rows(list(wanted), pools)
        finally:
            torch.set_num_threads(before)

    def _rows(self, wanted: list[int], pools: tuple[ThreadPoolExecutor, ThreadPoolExecutor]) -> Iterator[list[Block]]:
        todo = self._order(wanted)
        strip = _Strip(self._plan, self._dino.model.embed_dim, self._weights)
        tokens = self._tokens([(r, c) for r in todo for c in range(self._plan.shape[1])], pools)
        for r in todo:
            strip.begin(r)
            for _ in range(self._plan.shape[1]):
                strip.add(next(tokens))
                self._advance(1)
            if r in wanted:
                yield strip.blocks()

    def cost(self, wanted: Iterable[int]) -> int:
        """How many tiles `rows(wanted)` runs."""
        return len(self._order(list(wanted))) * self._plan.shape[1]

    def _order(self, wanted: list[int]) -> list[int]:
        """Rows of tiles to run: those wanted, and what overlaps their blocks from above."""
        rows: set[int] = set()
        for r in wanted:
            rows |= set(range(self._plan.first_needed(r), r + 1))
        return sorted(rows)

    def _tokens(
        self, tiles: list[tuple[int, int]], pools: tuple[ThreadPoolExecutor, ThreadPoolExecutor]
    ) -> Iterator[_Tokens]:
        """Tokens of tiles, in order; read and run a few ahead."""
        readers, models = pools
        batch = self._settings.batch_of(self._plan.tile[0] * self._plan.tile[1])
        batches = [tiles[i : i + batch] for i in range(0, len(tiles), batch)]
        ahead: deque[Future[list[_Tokens]]] = deque()
        reads: deque[tuple[list[tuple[int, int]], list[Future[Prepared | None]]]] = deque()
        position = 0
        while position < len(batches) or reads or ahead:
            while position < len(batches) and len(reads) <= self._settings.streams:
                part = batches[position]
                reads.append((part, [readers.submit(self._reader, self._plan.pixels_of(*tile)) for tile in part]))
                position += 1
            while reads and len(ahead) <= self._settings.streams:
                part, futures = reads.popleft()
                ahead.append(models.submit(self._forward, part, [future.result() for future in futures]))
            yield from ahead.popleft().result()

    def _forward(self, tiles: list[tuple[int, int]], prepared: list[Prepared | None]) -> list[_Tokens]:
        real = [(n, one) for n, one in enumerate(prepared) if one is not None]
        out = [_Tokens(c, None, None, None) for _, c in tiles]
        if real:
            places = [(self._plan.row_starts[tiles[n][0]], self._plan.col_starts[tiles[n][1]]) for n, _ in real]
            patches, cls = self._run([one for _, one in real], places)
            for k, (n, one) in enumerate(real):
                out[n] = _Tokens(tiles[n][1], patches[k], cls[k], one.valid.numpy())
        return out


class _Strip:
    """The blended tokens of the row of tiles at work, and of what lies below its blocks."""

    def __init__(self, plan: TilePlan, dim: int, weights: Tensor) -> None:
        self._plan, self._weights = plan, weights
        height, width = plan.tile[0], plan.grid[1]
        self._sum = torch.zeros(height, width, dim)
        self._weight = torch.zeros(height, width, 1)
        self._valid = np.zeros((height, width), np.bool_)
        self._cls: dict[int, Tensor | None] = {}
        self._row = -1
        self._top = 0

    def begin(self, r: int) -> None:
        """Move on to row `r`: what overlaps it stays."""
        move = min(self._plan.row_starts[r] - self._top, len(self._sum)) if self._row >= 0 else len(self._sum)
        for array in (self._sum, self._weight, torch.from_numpy(self._valid)):
            array[: len(array) - move] = array[move:].clone()
            array[len(array) - move :] = 0
        self._row, self._top, self._cls = r, self._plan.row_starts[r], {}

    def add(self, tile: _Tokens) -> None:
        """Blend a tile of the row in."""
        self._cls[tile.col] = tile.cls
        if tile.patches is None or tile.valid is None:
            return
        left = self._plan.col_starts[tile.col]
        here = (slice(None), slice(left, left + self._plan.tile[1]))
        self._sum[here] += tile.patches * self._weights
        self._weight[here] += self._weights
        self._valid[here] |= tile.valid

    def blocks(self) -> list[Block]:
        """The blocks of the row, finished."""
        first, end = self._plan.rows_of(self._row)
        rows = slice(0, end - first)
        dim = self._sum.shape[-1]
        out = []
        for c in range(self._plan.shape[1]):
            left, right = self._plan.cols_of(c)
            weight = self._weight[rows, left:right]
            tokens = self._sum[rows, left:right] / torch.where(weight > 0, weight, 1.0)
            cls = self._cls[c]
            out.append(
                Block(
                    tile=(self._row, c),
                    origin=(first, left),
                    patches=_half(tokens),
                    valid=self._valid[rows, left:right].copy(),
                    cls=np.zeros(dim, np.float16) if cls is None else _half(cls),
                )
            )
        return out


def _half(tokens: Tensor) -> NDArray[np.float16]:
    half = tokens.to(torch.float16)
    if not bool(half.isfinite().all()):
        raise InputError(
            "the features are not finite, or do not fit into float16 (largest value 65504), in which they are kept. "
            "Load with precision='fp32'; if that gives the same, the weights are damaged."
        )
    return half.numpy()


@contextmanager
def _pools(settings: Settings) -> Iterator[tuple[ThreadPoolExecutor, ThreadPoolExecutor]]:
    """A thread that reads (rasters are no two threads' business), and those that run the model."""
    options: dict[str, Any] = {"initializer": torch.set_num_threads, "initargs": (settings.threads,)}
    readers = ThreadPoolExecutor(1, "read", **options)
    models = ThreadPoolExecutor(settings.streams, "model", **options)
    try:
        yield readers, models
    finally:
        for pool in (readers, models):
            pool.shutdown(wait=False, cancel_futures=True)
        for pool in (readers, models):
            pool.shutdown(wait=True)
