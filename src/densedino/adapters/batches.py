"""Owns what a step is fitted on: tokens out of a feature store, or random crops; all counted by (seed, step)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from densedino.adapters.labels import Window, read_truth, sample_labels
from densedino.engines.eager import LayerTokens
from densedino.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from densedino.adapters.labels import Example
    from densedino.adapters.tasks import Task
    from densedino.features.store import FeatureStore
    from densedino.images.transforms import Geometry, Prepared, Transform

__all__ = ["Augment", "CroppedPictures", "StoredTokens", "order"]

_CACHE_BYTES = 1 << 30
_CELLS = 4  # of labels along a patch of 16 pixels: finer ones teach a head nothing that it can tell


def order(step: int, batch_size: int, count: int, *, seed: int) -> list[int]:
    """The examples of a step: every one once in each pass over all, in an order of its own."""
    places = range(step * batch_size, (step + 1) * batch_size)
    orders = {n: np.random.default_rng((seed, 0, n)).permutation(count) for n in {place // count for place in places}}
    return [int(orders[place // count][place % count]) for place in places]


class StoredTokens:
    """Taps of examples, out of a store that has the blocks asked for; kept in memory up to 1 GiB."""

    def __init__(self, store: FeatureStore, task: Task, layers: Sequence[int], *, depth: int) -> None:
        self.store, self.task, self.layers, self.depth = store, task, tuple(layers), depth
        self._transform = store.transform
        self._kept: dict[str, tuple[list[LayerTokens], tuple[int, int]]] = {}
        self._bytes = 0

    def taps(self, example: Example) -> tuple[list[LayerTokens], Geometry, tuple[int, int]]:
        """Taps of one example (B = 1), what became of its picture's size, and that size.

        Raises:
            InputError: its features are not finite, or its labels have another size than the picture.
            StoreError: the store does not have it.
        """
        key = example.image.as_posix()
        if key not in self._kept:
            features = self.store[key]
            last = LayerTokens(features.patches, features.cls, features.registers)
            taps = [last if layer == self.depth - 1 else features.layers[layer] for layer in self.layers]
            if not all(bool(torch.isfinite(part.sum())) for tap in taps for part in (tap.patches, tap.cls)):
                raise InputError(
                    f"{key}: its features in {str(self.store.path)!r} are not finite numbers. Delete that store and "
                    "extract again; if they come again, the checkpoint is damaged, or needs fp32."
                )
            size = sum(part.nbytes for tap in taps for part in (tap.patches, tap.cls))
            if self._bytes + size > _CACHE_BYTES:
                return taps, self._transform.geometry(*features.source_sizes[0]), features.source_sizes[0]
            self._bytes += size
            self._kept[key] = (taps, features.source_sizes[0])
        taps, source = self._kept[key]
        return taps, self._transform.geometry(*source), source

    def batch(self, examples: Sequence[Example], *, seed: int, step: int) -> tuple[list[LayerTokens], Tensor]:
        """Taps and targets of several; grids that differ are cut to what all have, at counted places."""
        found = [self.taps(example) for example in examples]
        grids = [geometry.grid for _, geometry, _ in found]
        height, width = min(g[0] for g in grids), min(g[1] for g in grids)
        rng = np.random.default_rng((seed, 1, step))
        parts: list[list[LayerTokens]] = []
        targets = []
        for example, (taps, geometry, source) in zip(examples, found, strict=True):
            top, left = (int(rng.integers(0, n - m + 1)) for n, m in zip(geometry.grid, (height, width), strict=True))
            parts.append([_cut(tap, geometry.grid, top, left, height, width) for tap in taps])
            targets.append(self._target(example, geometry, source, (top, left), (height, width)))
        joined = [
            LayerTokens(*(torch.cat([getattr(p[i], name) for p in parts]) for name in ("patches", "cls", "registers")))
            for i in range(len(self.layers))
        ]
        return joined, torch.stack(targets)

    def _target(
        self,
        example: Example,
        geometry: Geometry,
        source: tuple[int, int],
        corner: tuple[int, int],
        grid: tuple[int, int],
    ) -> Tensor:
        truth = read_truth(self.task, example)
        if isinstance(truth, int):
            return torch.tensor(truth)
        check_truth(example, truth, source)
        stride = self._transform.stride
        window = Window(corner[0] * stride, corner[1] * stride, grid[0] * stride, grid[1] * stride)
        cells = _CELLS * stride // 16
        size = (grid[0] * cells, grid[1] * cells)
        return sample_labels(self.task, truth, window, size, geometry=geometry, source=source)


def _cut(tap: LayerTokens, grid: tuple[int, int], top: int, left: int, height: int, width: int) -> LayerTokens:
    finer = tap.patches.shape[1] // grid[0]  # early stages of a ConvNeXt
    rows, cols = (slice(start * finer, (start + n) * finer) for start, n in ((top, height), (left, width)))
    return LayerTokens(tap.patches[:, rows, cols], tap.cls, tap.registers)


def check_truth(example: Example, truth: Tensor, source: tuple[int, int]) -> None:
    """Refuse labels of another size than their picture, as decoded.

    Raises:
        InputError: so it is.
    """
    if tuple(truth.shape) != source:
        raise InputError(
            f"{example.label}: it has {truth.shape[0]}×{truth.shape[1]} pixels (H×W), but its image {example.image} "
            f"has {source[0]}×{source[1]} upright. Labels must have the pixels of their image."
        )


@dataclass(frozen=True, kw_only=True)
class Augment:
    """How a picture is changed for a step that trains the backbone."""

    crop: int = 224
    """Pixels of the square that is seen; a multiple of the stride."""
    scale: tuple[float, float] = (0.75, 1.5)
    """Of enlargement; 1 for depth, whose numbers go with it."""
    mirror: bool = True
    jitter: float = 0.2
    """Of brightness and contrast."""

    def __post_init__(self) -> None:
        if self.crop < 32 or self.crop % 32 or not 0 < self.scale[0] <= self.scale[1] or not 0 <= self.jitter < 1:
            raise InputError(
                f"crop {self.crop}, scale {self.scale}, jitter {self.jitter}: crop must be a multiple of 32, "
                "scale two rising factors above 0, jitter in [0, 1)."
            )


class CroppedPictures:
    """Pictures as a model takes them, each step another crop of each; kept decoded up to 1 GiB."""

    def __init__(self, transform: Transform, task: Task, augment: Augment) -> None:
        self.transform, self.task, self.augment = transform, task, augment
        self._kept: dict[str, Prepared] = {}
        self._bytes = 0

    def batch(self, examples: Sequence[Example], *, seed: int, step: int) -> tuple[Tensor, Tensor]:
        """Pixels [B, C, crop, crop] and targets.

        Raises:
            ImageError: a picture that cannot be read.
            InputError: labels of another size.
        """
        pairs = [self._one(e, np.random.default_rng((seed, 2, step, i))) for i, e in enumerate(examples)]
        return torch.stack([pixels for pixels, _ in pairs]), torch.stack([target for _, target in pairs])

    def _one(self, example: Example, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        prepared = self._prepared(example)
        window = self._window(prepared.input_size, rng)
        size = (self.augment.crop, self.augment.crop)
        rows, cols = slice(window.top, window.top + window.height), slice(window.left, window.left + window.width)
        pixels = prepared.pixels[None, :, rows, cols]
        pixels = F.interpolate(pixels, size=size, mode="bilinear", antialias=True)[0]
        pixels = pixels.flip(2) if window.mirrored else pixels
        gain, shift = (rng.uniform(-1, 1, 2) * self.augment.jitter).tolist()
        pixels = (pixels - pixels.mean()) * (1 + gain) + pixels.mean() + shift
        truth = read_truth(self.task, example)
        if isinstance(truth, int):
            return pixels, torch.tensor(truth)
        check_truth(example, truth, prepared.source_size)
        cells = self.augment.crop * _CELLS // 16
        geometry = self.transform.geometry(*prepared.source_size)
        target = sample_labels(self.task, truth, window, (cells, cells), geometry=geometry, source=prepared.source_size)
        return pixels, target

    def _prepared(self, example: Example) -> Prepared:
        key = str(example.image)
        if key in self._kept:
            return self._kept[key]
        prepared = self.transform(example.image)
        if self._bytes + prepared.pixels.nbytes <= _CACHE_BYTES:
            self._bytes += prepared.pixels.nbytes
            self._kept[key] = prepared
        return prepared

    def _window(self, size: tuple[int, int], rng: np.random.Generator) -> Window:
        """Of the picture's own pixels, without padding; smaller and distorted where the picture is smaller."""
        least, most = (1.0, 1.0) if self.task.kind == "depth" else self.augment.scale
        side = self.augment.crop / math.exp(rng.uniform(math.log(least), math.log(most)))
        height, width = (min(round(side), n) for n in size)
        top, left = (int(rng.integers(0, n - m + 1)) for n, m in zip(size, (height, width), strict=True))
        return Window(top, left, height, width, bool(self.augment.mirror and rng.random() < 0.5))
