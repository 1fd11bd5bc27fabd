"""Owns what is searched for: an image, a box or a point of one, or of a row of the store, as one vector."""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from densedino.errors import InputError
from densedino.features.extractor import load
from densedino.features.neighbours import unit
from densedino.features.store import FeatureStore

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from densedino.features.extractor import FeatureExtractor
    from densedino.features.scenes import SceneStore
    from densedino.features.tokens import Features

__all__ = ["Asker", "Example", "Region", "examples_of", "parse_region", "region_patches"]

Region = tuple[float, ...]
"""(x, y) of a pixel, or (x, y, width, height) of a box, in pixels of the image as decoded, from the top left."""

_NUMBER = r"\d+(?:\.\d+)?"
_REGION = rf"{_NUMBER}(?:,{_NUMBER}){{1}}(?:,{_NUMBER},{_NUMBER})?"


@dataclass(frozen=True)
class Example:
    """Something like what is sought, or, as a negative, unlike it."""

    image: str
    """A file, or the key of a row of the store."""
    region: Region | None
    """None for all of it."""
    stored: bool
    """Whether `image` is a row of the store."""

    @property
    def title(self) -> str:
        """In a few words."""
        part = "" if self.region is None else f" at {','.join(f'{number:g}' for number in self.region)}"
        return self.image + part


def parse_region(text: str) -> Region:
    """`x,y` or `x,y,w,h`, in pixels.

    Raises:
        InputError: neither of these.
    """
    if not re.fullmatch(_REGION, text.replace(" ", "")):
        raise InputError(f"{text!r} is no place in an image: give x,y for a point, or x,y,w,h for a box, in pixels.")
    region = tuple(float(number) for number in text.split(","))
    if len(region) == 4 and min(region[2:]) <= 0:
        raise InputError(f"the box {text!r} is empty: width and height, its last two numbers, must be above 0.")
    return region


def examples_of(
    images: Sequence[str],
    *,
    regions: Sequence[Region] = (),
    further: Sequence[str] = (),
    stored: bool = False,
) -> tuple[list[Example], list[Example]]:
    """Pair images with regions; and read further examples, whose places may be in the first image.

    Args:
        images: files, or keys of the store, each perhaps with its own place behind an @: `street.jpg@120,80`.
        regions: of the images, in their order; of a single image, any number, each an example of its own.
        further: as `images`, or only a place, of the first image.
        stored: whether `images` are keys.

    Raises:
        InputError: the numbers of images and regions do not go together, or a place is not one.
    """
    firsts = [_example(text, stored=stored) for text in images]
    if regions and len(firsts) == 1 and firsts[0].region is None:
        firsts = [Example(firsts[0].image, region, stored) for region in regions]
    elif regions:
        if len(regions) != len(firsts) or any(one.region for one in firsts):
            raise InputError(
                f"{len(regions)} places for {len(firsts)} images: give one for each, in order, or write each behind "
                "its image: --query a.png@120,80 b.png@10,20,64,64."
            )
        firsts = [Example(one.image, region, stored) for one, region in zip(firsts, regions, strict=True)]
    others = []
    for text in further:
        if re.fullmatch(_REGION, text):
            if not firsts:
                raise InputError(f"{text!r} is a place, but of which image? Write image@{text}.")
            others.append(Example(firsts[0].image, parse_region(text), stored))
        else:
            others.append(_example(text, stored=False))
    return firsts, others


def _example(text: str, *, stored: bool) -> Example:
    match = re.fullmatch(rf"(.+)@({_REGION})", text)
    return Example(match[1], parse_region(match[2]), stored) if match else Example(text, None, stored)


def region_patches(features: Features, region: Region | None) -> NDArray[np.int64]:
    """Numbers, row by row, of the valid patches of one image whose centres lie in `region`; of at least one patch.

    Raises:
        InputError: the region is not in the image, or shows padding or nodata alone.
    """
    height, width = features.source_sizes[0]
    valid = features.valid[0].cpu().numpy()
    x, y, w, h = (*region, 0.0, 0.0)[:4] if region is not None else (0.0, 0.0, float(width), float(height))
    if not (0 <= x < width and 0 <= y < height and x + w <= width + 1 and y + h <= height + 1):
        raise InputError(
            f"{','.join(f'{number:g}' for number in region or ())} is not in the image, which is {width} pixels wide "
            f"and {height} high."
        )
    across = np.array([height, width]) / features.input_sizes[0] * features.stride  # source pixels per patch
    rows, cols = ((np.arange(side) + 0.5) * step for side, step in zip(valid.shape, across, strict=True))
    inside = ((rows >= y) & (rows < y + h))[:, None] & ((cols >= x) & (cols < x + w))
    if not inside.any():
        middle = ((y + h / 2 + 0.5 * (h == 0)) / across[0], (x + w / 2 + 0.5 * (w == 0)) / across[1])
        row, col = (min(int(place), side - 1) for place, side in zip(middle, valid.shape, strict=True))
        inside[row, col] = True
    found = np.flatnonzero(inside & valid)
    if not len(found):
        raise InputError("there is nothing to search for: the place shows padding, nodata or transparent pixels alone.")
    return found


class Asker:
    """Turns examples into vectors, by the rows of the store or by its model, which is loaded when it is needed."""

    def __init__(self, store: FeatureStore | SceneStore, *, weights: str | None = None, device: str = "auto") -> None:
        self.store, self._weights, self._device = store, weights, device
        self._features: dict[tuple[str, bool], Features] = {}

    @functools.cached_property
    def extractor(self) -> FeatureExtractor:
        """The model of the store, with its transform.

        Raises:
            WeightsError: the weights are not to be had.
            InputError: they are others.
        """
        card = self.store.card
        weights = self._weights or {"random": "random", "embedded": None}.get(card.source, _there(card.source))
        precision = self.store.metadata["precision"].partition(" ")[0]
        dino = load(
            card.name if weights is None else card.model, weights=weights, device=self._device, precision=precision
        )
        if dino.card.sha256 != card.sha256:
            raise InputError(
                f"{self.store} was made with weights {card.name} ({card.sha256[:12]}, from {card.source}), not with "
                f"{dino.card.name} ({dino.card.sha256[:12]}). Give their file: --weights."
            )
        return dino.with_transform(self.store.transform)

    def features(self, example: Example) -> Features:
        """Of the example's whole image.

        Raises:
            StoreError: the store has no such row.
            ImageError: the file is not a usable picture.
        """
        name = (example.image, example.stored)
        if name not in self._features:
            stored = self.store[example.image] if example.stored and isinstance(self.store, FeatureStore) else None
            self._features[name] = stored or self.extractor(example.image)
        return self._features[name]

    def source(self, example: Example) -> str:
        """The file that shows the example."""
        if example.stored and isinstance(self.store, FeatureStore):
            return self.store.source(example.image)
        return example.image

    def image_vector(self, example: Example) -> NDArray[np.float32]:
        """CLS [D] of the example's whole image, of length 1."""
        return unit(self.features(example).cls[0].cpu().float().numpy())

    def region_vector(self, example: Example) -> NDArray[np.float32]:
        """The mean direction [D] of the patches in the example's region, of length 1.

        Raises:
            InputError: the region is not in the image, or shows nothing.
        """
        return unit(self._tokens(example)[0].mean(0))

    def cells(self, example: Example) -> set[tuple[str, tuple[int, int]]]:
        """(key, (row, column)) of the patches of a stored example's region; nothing for others."""
        if not example.stored or example.region is None:
            return set()
        return {(example.image, cell) for cell in self._tokens(example)[1]}

    def _tokens(self, example: Example) -> tuple[NDArray[np.float32], list[tuple[int, int]]]:
        """Directions [n, D] of the patches in the example's region, and where they are."""
        if example.stored and not isinstance(self.store, FeatureStore):
            return self._of_scene(self.store, example.region)
        features = self.features(example)
        numbers = region_patches(features, example.region)
        tokens = features.patches[0].cpu().float().flatten(0, 1).numpy()[numbers]
        return unit(tokens), [divmod(number, features.grid[1]) for number in numbers.tolist()]

    @staticmethod
    def _of_scene(store: SceneStore, region: Region | None) -> tuple[NDArray[np.float32], list[tuple[int, int]]]:
        if region is None:
            raise InputError("a scene is not a query for itself; give a place in it: --point x,y or --box x,y,w,h.")
        (x, y), (w, h) = region[:2], (*region, 0.0, 0.0)[2:4]
        spans = []
        for first, length, patches in ((y, h, store.grid[0]), (x, w, store.grid[1])):
            start = math.floor(first / store.stride + 0.5 * (length > 0))  # the first patch whose centre is inside
            end = math.ceil((first + length) / store.stride - 0.5) if length else start + 1
            start = min(start, int((first + length / 2) / store.stride))
            if not 0 <= first < first + length + 1 <= patches * store.stride + 1:
                height, width = (side * store.stride for side in store.grid)
                raise InputError(f"{region} is not in the scene, which is {width} pixels wide and {height} high.")
            spans.append((start, max(end, start + 1)))
        rows, cols = spans
        tokens, valid = store.read(rows=rows, cols=cols)
        if not valid.any():
            raise InputError(f"there is nothing to search for: {region} shows nodata alone.")
        where = [(row + rows[0], col + cols[0]) for row, col in np.argwhere(valid).tolist()]
        return unit(tokens[valid]), where


def _there(source: str) -> str | None:
    """The checkpoint's place, if it can be read from there again."""
    return source if "://" in source or Path(source).exists() else None
