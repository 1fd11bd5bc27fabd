"""Owns a scene as a map of tiles at every zoom: pictures and features, of a scene's store or computed of the raster.

At level L one patch of a tile stands for 2^L by 2^L patches of the scene at full size. A raster is read at that scale
(overviews help), with a margin around the tile that the model sees too and that is cut off. Of a store every 2^L-th
patch is taken.
"""

from __future__ import annotations

import io
import math
import threading
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from densedino.errors import DenseDinoError, InputError, StoreError
from densedino.features.scenes import SceneStore
from densedino.features.store import open_lance, read_metadata
from densedino.features.tokens import Features
from densedino.geo.bands import choose_bands
from densedino.geo.radiometry import Scaling, find_product, make_scaling
from densedino.geo.raster import Scene
from densedino.images.decoding import Pixels
from densedino.weights.card import WeightsCard

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from densedino.features.extractor import FeatureExtractor
    from densedino.images.transforms import Prepared

__all__ = ["TILE", "SceneMap", "open_scene", "scene_card"]

TILE = 32
"""Patches on a side of a tile."""
_MARGIN = 4  # patches around it that the model sees too
_STORED_LEVELS = 3  # of a store; from there on, tiles are cut from a thinned copy in memory
_Place = tuple[int, int, int]


class SceneMap:
    """Tiles by (level, row, column). One thread at a time reads the raster, the others wait."""

    def __init__(
        self, scene: Scene, places: Sequence[int], scaling: Scaling, *, stride: int, store: SceneStore | None = None
    ) -> None:
        self.scene, self.store, self.stride = scene, store, stride
        self._places, self._scaling = tuple(places), scaling
        self._lock = threading.Lock()
        self._thin: tuple[NDArray[np.float16], NDArray[np.bool_]] | None = None
        self.grid = (math.ceil(scene.size[0] / stride), math.ceil(scene.size[1] / stride))
        """(h, w) in patches, at full size."""
        self.levels = 1 + max(0, math.ceil(math.log2(max(self.grid) / TILE)))
        """At the last one, one tile shows all."""

    def __contains__(self, place: _Place) -> bool:
        level, row, column = place
        return 0 <= level < self.levels and all(
            0 <= n < math.ceil(side / (TILE << level)) for n, side in zip((row, column), self.grid, strict=True)
        )

    def picture(self, place: _Place) -> bytes:
        """A JPEG of a tile; black where there is nothing. Raises: ImageError: the raster cannot be read."""
        values, valid, white = self._read(place, margin=0)[:3]
        eight = np.where(valid[..., None], values * (255 / white), 0).round().clip(0, 255).astype(np.uint8)
        image = Image.fromarray(eight if eight.shape[2] == 3 else eight[..., 0])
        file = io.BytesIO()
        image.convert("RGB").save(file, "JPEG", quality=88)
        return file.getvalue()

    def prepared(self, place: _Place, dino: FeatureExtractor) -> tuple[Prepared, tuple[int, int]]:
        """A tile with its margin as the model takes it, and how many patches of margin it has above and to the left.

        Raises:
            ImageError: the raster cannot be read, or the tile is smaller than a patch.
        """
        values, valid, white, skip = self._read(place, margin=_MARGIN)
        if values.shape[2] == 1 and dino.transform.in_chans == 3:
            values = values.repeat(3, axis=2)
        transform = replace(dino.transform, resize=None, fit="pad", max_tokens=None)
        pixels = Pixels(array=values, valid=None if valid.all() else valid, max_value=white, name=f"tile {place}")
        return transform(pixels), skip

    def cut(self, features: Features, place: _Place, skip: tuple[int, int]) -> Features:
        """Features of a tile (B = 1) without its margin."""
        height, width = self._patches(place)
        rows, columns = slice(skip[0], skip[0] + height), slice(skip[1], skip[1] + width)
        layers = {
            number: replace(one, patches=one.patches[:, rows, columns]) for number, one in features.layers.items()
        }
        return _tile(
            features.patches[:, rows, columns], features.valid[:, rows, columns], features, layers, self._pixels(place)
        )

    def stored(self, place: _Place) -> Features | None:
        """What the store has of a tile; None where there is no store. Raises: StoreError: it cannot be read."""
        if self.store is None:
            return None
        level, row, column = place
        step = 1 << level
        (top, left), (height, width) = (row * TILE * step, column * TILE * step), self._patches(place)
        if level < _STORED_LEVELS:
            rows, columns = (top, min(top + TILE * step, self.grid[0])), (left, min(left + TILE * step, self.grid[1]))
            patches, valid = self.store.read(rows=rows, cols=columns)
            patches, valid = patches[::step, ::step], valid[::step, ::step]
        else:
            thin, known = self._thinned()
            step >>= _STORED_LEVELS
            rows_, columns_ = (slice(n * TILE * step, (n + 1) * TILE * step, step) for n in (row, column))
            patches, valid = thin[rows_, columns_], known[rows_, columns_]
        tokens = torch.from_numpy(patches.astype(np.float32))[None, :height, :width]
        like = Features(
            tokens, tokens.new_zeros(1, tokens.shape[-1]), tokens.new_zeros(1, 0, 0), tokens, self.stride, (), (), ()
        )
        return _tile(tokens, torch.from_numpy(valid.copy())[None, :height, :width], like, {}, self._pixels(place))

    def _thinned(self) -> tuple[NDArray[np.float16], NDArray[np.bool_]]:
        """Every 8th patch of every 8th row of the store, read once, block by block."""
        assert self.store is not None
        with self._lock:
            if self._thin is None:
                step = 1 << _STORED_LEVELS
                shape = (math.ceil(self.grid[0] / step), math.ceil(self.grid[1] / step))
                thin, known = np.zeros((*shape, self.store.dim), np.float16), np.zeros(shape, np.bool_)
                for block in self.store.blocks():
                    (i, j) = block.origin
                    r, c = -i % step, -j % step
                    part, real = block.patches[r::step, c::step], block.valid[r::step, c::step]
                    top, left = (i + r) // step, (j + c) // step
                    here = (slice(top, top + part.shape[0]), slice(left, left + part.shape[1]))
                    thin[here], known[here] = part, real
                self._thin = thin, known
            return self._thin

    def _patches(self, place: _Place) -> tuple[int, int]:
        """(h, w) of a tile."""
        level, *numbers = place
        height, width = (
            min(TILE, math.ceil(side / (1 << level)) - n * TILE) for n, side in zip(numbers, self.grid, strict=True)
        )
        return height, width

    def _pixels(self, place: _Place) -> tuple[int, int]:
        """(H, W) of the scene's part of a tile, at the tile's own scale."""
        level, *numbers = place
        side = TILE * self.stride
        height, width = (
            max(1, min(side, round(total / (1 << level)) - n * side))
            for n, total in zip(numbers, self.scene.size, strict=True)
        )
        return height, width

    def _read(self, place: _Place, *, margin: int) -> tuple[NDArray[Any], NDArray[np.bool_], float, tuple[int, int]]:
        """Values [h, w, C], valid [h, w], white, and the patches of margin above and to the left."""
        level, *numbers = place
        spans, skip = [], []
        for n, own, total in zip(numbers, self._pixels(place), self.scene.size, strict=True):
            before = min(margin, n * TILE)
            start = (n * TILE - before) * self.stride
            end = min(n * TILE * self.stride + own + margin * self.stride, max(1, round(total / (1 << level))))
            first = start << level
            spans.append((first, max(1, min(end << level, total) - first), end - start))
            skip.append(before)
        (top, height, out_height), (left, width, out_width) = spans
        with self._lock:
            array, valid = self.scene.read((top, left, height, width), bands=self._places, out=(out_height, out_width))
        values, white = self._scaling.apply(array, valid)
        return values, valid, white, (skip[0], skip[1])


def _tile(patches: torch.Tensor, valid: torch.Tensor, like: Features, layers: Any, size: tuple[int, int]) -> Features:
    grid = (patches.shape[1], patches.shape[2])
    return replace(
        like, patches=patches, valid=valid, grids=(grid,), input_sizes=(size,), source_sizes=(size,), layers=layers
    )


def scene_card(path: Path) -> WeightsCard | None:
    """The weights that made the store of a scene; None if `path` is no such store."""
    if not (path / "_versions").is_dir():
        return None
    metadata = read_metadata(open_lance(path), path=path)
    return WeightsCard.from_dict(metadata["weights"]) if "scene" in metadata else None


def open_scene(given: str, dino: FeatureExtractor) -> SceneMap:
    """The scene that `densedino serve` was given: a scene's store, or a raster.

    Raises:
        InputError: a store whose raster is gone.
        StoreError: a store that cannot be read, or is of other weights.
        ImageError: a raster that cannot be read.
    """
    if scene_card(Path(given)) is not None:
        store = SceneStore(given)
        if store.card.sha256 != dino.card.sha256:
            raise StoreError(f"{store} was not made by {dino.card.name}. Give the weights that made it: --weights.")
        about = store.metadata["scene"]
        try:
            files = [source["path"] for source in about["sources"]]
            scene = Scene(files, gsd=about["gsd"], nodata=about["nodata"])
            if scene.size != tuple(about["size"]):  # it was reprojected
                scene.close()
                scene = Scene(files, gsd=about["gsd"], crs=about["crs"], nodata=about["nodata"])
        except DenseDinoError as error:
            raise InputError(f"the raster of the scene {given!r} cannot be shown: {error}") from error
        scaling = about["scaling"] | {name: tuple(about["scaling"][name]) for name in ("gains", "offsets", "notes")}
        return SceneMap(scene, about["places"], Scaling(**scaling), stride=store.stride, store=store)
    scene = Scene([given])
    product = find_product(scene.sources)
    chosen = choose_bands(
        scene.bands,
        want="auto",
        sensor="auto",
        channels=dino.transform.in_chans,
        hint=product.spacecraft if product else "",
    )
    return SceneMap(scene, chosen.places, make_scaling(scene, chosen, product=product), stride=dino.model.stride)
