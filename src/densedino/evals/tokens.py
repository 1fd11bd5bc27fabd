"""Owns the features of a data set: extracted once into the run's store, and read by every head and seed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from densedino.errors import InputError
from densedino.features.extract import extract
from densedino.features.layout import grids_of
from densedino.features.store import FeatureStore, reading

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from densedino.evals.datasets import Dataset, Sample
    from densedino.features.extractor import FeatureExtractor

__all__ = ["TokenMap", "Tokens", "extract_tokens"]

_KEPT_BYTES = 2**31
"""Of dense features that are held in memory by a job; beyond it they are read again whenever they are needed."""


def extract_tokens(
    dino: FeatureExtractor,
    data: Dataset,
    *,
    output: Path,
    layers: Sequence[int],
    advance: Callable[[int], None] = lambda count: None,
) -> None:
    """Compute the features of all samples that `output` does not have yet (see `features.extract`).

    Raises:
        InputError: features that are not finite, or an image that cannot be read; the message names the file.
        StoreError: `output` holds features of other numbers.
    """
    paths = [sample.image.resolve() for sample in data.samples]
    report = extract(dino, paths, output=output, layers=layers, retry=True, advance=advance)
    if report.quarantined:
        first = report.quarantined[0]
        raise InputError(
            f"{len(report.quarantined)} of {len(paths)} images have no features. The first is {first.path!r}: "
            f"{first.reason} Mend or remove it: an evaluation leaves nothing out unsaid."
        )


class TokenMap:
    """The dense features of one image and where they stand in its pixels."""

    def __init__(
        self, array: NDArray[np.float16], *, source_size: tuple[int, int], input_size: tuple[int, int], stride: float
    ) -> None:
        self.array = array
        """[h, w, D]."""
        self.tensor = torch.from_numpy(np.require(array, requirements=["C", "W"]))
        """The same numbers."""
        self.source_size = source_size
        """(H, W) of the file."""
        self.input_size = input_size
        """(H, W) that the model saw, without padding."""
        self.stride = stride
        """Pixels of the input per token."""

    def float(self) -> torch.Tensor:
        """[h, w, D] float32."""
        return self.tensor.float()

    def to_tokens(self, points: NDArray[np.floating]) -> NDArray[np.float64]:
        """Points (x, y) in pixels of the file [n, 2] as places on the grid; 0 is the first token's centre."""
        height, width = self.source_size
        scale = np.array([self.input_size[1] / width, self.input_size[0] / height]) / self.stride
        return np.asarray(points, np.float64) * scale - 0.5

    def to_pixels(self, places: NDArray[np.floating]) -> NDArray[np.float64]:
        """Inverse of `to_tokens`."""
        height, width = self.source_size
        scale = np.array([width / self.input_size[1], height / self.input_size[0]]) * self.stride
        return (np.asarray(places, np.float64) + 0.5) * scale


class Tokens:
    """Features of a data set, by sample."""

    def __init__(self, path: Path, *, layers: Sequence[int] = ()) -> None:
        self._store = FeatureStore(path)
        depth_columns = self._store.metadata["layers"]
        self._columns = [f"patches_layer{i}" for i in depth_columns] if layers else ["patches"]
        self._rows = {key: row for row, key in enumerate(self._store.keys())}
        self._kept: dict[str, TokenMap] = {}
        self._bytes = 0

    def _key(self, sample: Sample) -> str:
        key = sample.image.resolve().as_posix()
        if key not in self._rows:
            raise InputError(
                f"{str(sample.image)!r} has no features: is it a second name of another image? Remove one."
            )
        return key

    def vectors(self, samples: Sequence[Sample]) -> torch.Tensor:
        """CLS of each sample [n, D] float32."""
        rows = [self._rows[self._key(sample)] for sample in samples]
        found = np.empty((len(self._rows), self._store.metadata["embed_dim"]), np.float32)
        start = 0
        for batch in self._store.batches(columns=["cls"]):
            found[start : start + len(batch["cls"])] = batch["cls"]
            start += len(batch["cls"])
        return torch.from_numpy(found[rows])

    def means(self, samples: Sequence[Sample]) -> torch.Tensor:
        """The mean of the patches of each sample [n, D] float32."""
        return torch.stack([self.map(sample, keep=False).float().mean((0, 1)) for sample in samples])

    def map(self, sample: Sample, *, keep: bool = True) -> TokenMap:
        """The dense features of a sample; layers side by side, on the finest of their grids."""
        key = self._key(sample)
        if key not in self._kept:
            found = self._read(self._rows[key])
            if not keep or self._bytes + found.array.nbytes > _KEPT_BYTES:
                return found
            self._kept[key] = found
            self._bytes += found.array.nbytes
        return self._kept[key]

    def _read(self, row: int) -> TokenMap:
        names = ["height", "width", "input_height", "input_width", "grid_h", "grid_w"]
        with reading(self._store.path):
            table = self._store.dataset.take([row], columns=[*names, *self._columns])
        height, width, input_height, input_width, grid_h, grid_w = (table[name][0].as_py() for name in names)
        maps = [grids_of(table[name].chunk(0), [(grid_h, grid_w)])[0] for name in self._columns]
        finest = max(one.shape[0] for one in maps)
        maps = [one.repeat(finest // one.shape[0], 0).repeat(finest // one.shape[0], 1) for one in maps]
        return TokenMap(
            np.concatenate(maps, axis=2) if len(maps) > 1 else maps[0],
            source_size=(height, width),
            input_size=(input_height, input_width),
            stride=self._store.metadata["stride"] * grid_h / finest,
        )
