"""Owns the images a server was started with: by number, of a store or of files; and exact search among them."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from densedino.errors import ImageError, InputError, StoreError
from densedino.features.patch_index import FOLDER, PatchIndex
from densedino.features.store import FeatureStore, reading
from densedino.images.containers import open_regular
from densedino.images.datasets import list_inputs

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from densedino.features.extractor import FeatureExtractor
    from densedino.features.tokens import Features

__all__ = ["Collection", "Hit", "open_collection"]

_ROWS = 64  # of a store, read at once
_PATCHES_PER_IMAGE = 16  # asked of an index for every image wanted: neighbours are often of one image
_KEPT_BYTES = 2**30  # of the features of files, kept for the search


@dataclass(frozen=True, kw_only=True)
class Hit:
    """The patch of one image that is nearest to a query; of CLS, the image as a whole."""

    item: int
    row: int
    column: int
    grid: tuple[int, int]
    score: float
    """Cosine."""


class Collection:
    """Images by number. Requests name numbers only: no path of theirs is ever opened.

    Features are those of the store; or those that the server computes of files, and notes by `keep`.
    """

    def __init__(self, names: Sequence[str], paths: Sequence[Path], *, store: FeatureStore | None = None) -> None:
        self.names, self.store = tuple(names), store
        self._paths = tuple(paths)
        self._kept: dict[int, tuple[Tensor, Tensor, tuple[int, int]]] = {}  # CLS [D]; patches [h * w, D], float16
        self._bytes = 0
        self._lock = threading.Lock()
        self._index = None if store is None else _open_index(store)

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, item: int) -> bool:
        return 0 <= item < len(self)

    @property
    def searchable(self) -> int:
        """Images whose features are at hand."""
        return len(self) if self.store is not None else len(self._kept)

    def check_model(self, dino: FeatureExtractor) -> None:
        """Refuse to mix features of a store with those of other weights: their numbers have nothing in common.

        Raises:
            StoreError: `dino` has not the weights that made the store.
        """
        if self.store is not None and self.store.card.sha256 != dino.card.sha256:
            raise StoreError(
                f"the store is of {self.store.card.name} (sha256 {self.store.card.sha256[:12]}), but {dino.card.name} "
                f"({dino.card.sha256[:12]}) is loaded. Give the weights that made it: --weights."
            )

    def read(self, item: int, *, limit: int) -> bytes:
        """The file of an image.

        Raises:
            ImageError: it is gone, or has more than `limit` bytes.
        """
        with open_regular(self._paths[item]) as file:
            data = file.read(limit + 1)
        if len(data) > limit:
            raise ImageError(
                f"{self.names[item]!r} has more than {limit:,} bytes. Raise max_bytes, or make it smaller."
            )
        return data

    def stored(self, item: int) -> Features | None:
        """What the store has of an image; None where there is no store, and features are computed."""
        return None if self.store is None else self.store[item]

    def keep(self, item: int, features: Features) -> bool:
        """Note features (B = 1) for the search; False once the memory for that is full."""
        patches = F.normalize(features.patches[0].float().flatten(0, 1), dim=-1).half().cpu()
        patches[~features.valid[0].flatten().cpu()] = 0
        with self._lock:
            if item in self._kept:
                return True
            if self._bytes + patches.numel() * 2 > _KEPT_BYTES:
                return False
            self._kept[item] = (F.normalize(features.cls[0].float(), dim=0).half().cpu(), patches, features.grids[0])
            self._bytes += patches.numel() * 2
        return True

    def search(self, query: Tensor, *, k: int, whole: bool = False) -> list[Hit]:
        """The images nearest to a vector [D], best first, each by its nearest patch, or `whole` by CLS.

        Exact, by reading everything; but patches of a store that `densedino search` has indexed are found by its index.

        Raises:
            InputError: the vector has not the length of the features.
        """
        query = F.normalize(query.float(), dim=0)
        if self._index is not None and not whole and len(query) == self._index.table.dim:
            return self._index.search(query, k=k)
        hits: list[Hit] = []
        for item, vectors, grid in self._vectors(whole=whole):
            if vectors.shape[1] != len(query):
                raise InputError(f"the query has {len(query)} numbers, and features here have {vectors.shape[1]}.")
            scores = vectors.float() @ query
            best = int(scores.argmax())
            row, column = (0, 0) if whole else divmod(best, grid[1])
            hits.append(Hit(item=item, row=row, column=column, grid=grid, score=float(scores[best])))
        return sorted(hits, key=lambda hit: -hit.score)[:k]

    def _vectors(self, *, whole: bool) -> Iterator[tuple[int, Tensor, tuple[int, int]]]:
        """Unit vectors [n, D] of each image, with its grid."""
        if self.store is None:
            with self._lock:
                kept = list(self._kept.items())
            for item, (cls, patches, grid) in kept:
                yield item, cls[None] if whole else patches, grid
            return
        name = "cls" if whole else "patches"
        item = 0
        columns = (name, "valid", "grid_h", "grid_w")
        for batch in self.store.batches(columns=columns, batch_size=_ROWS):
            for array, valid, height, width in zip(*(batch[column] for column in columns), strict=True):
                vectors = F.normalize(torch.from_numpy(array.copy()).float().reshape(-1, array.shape[-1]), dim=-1)
                if not whole and not valid.all():
                    vectors[~torch.from_numpy(valid.copy()).flatten()] = 0
                yield item, vectors, (int(height), int(width))
                item += 1


class _Index:
    """The index of a store's patches, and which image is at which address."""

    def __init__(self, store: FeatureStore, table: PatchIndex) -> None:
        self.table = table
        with reading(store.path):
            rows = store.dataset.to_table(columns=["grid_h", "grid_w"], with_row_address=True)
        self._items = {address: item for item, address in enumerate(rows["_rowaddr"].to_pylist())}
        self._grids = list(zip(rows["grid_h"].to_pylist(), rows["grid_w"].to_pylist(), strict=True))

    def search(self, query: Tensor, *, k: int) -> list[Hit]:
        """As `Collection.search`, of patches; fewer than k if the nearest patches are of few images."""
        found = self.table.nearest(query[None].numpy(), k=k * _PATCHES_PER_IMAGE)
        hits: dict[int, Hit] = {}
        for address, patch, score in zip(found.row[0], found.patch[0], found.score[0], strict=True):
            item = self._items.get(int(address))
            if item is not None and item not in hits:  # the first is the best
                grid = self._grids[item]
                row, column = divmod(int(patch), grid[1])
                hits[item] = Hit(item=item, row=row, column=column, grid=grid, score=float(score))
        return list(hits.values())[:k]


def _open_index(store: FeatureStore) -> _Index | None:
    """The index that `densedino search` made, brought up to date; None if there is none."""
    path = store.path / FOLDER / "patches"
    if not (path / "_versions").is_dir():
        return None
    table = PatchIndex(path, dim=store.metadata["embed_dim"])
    if table.report is None:
        return None
    table.sync(store)
    return _Index(store, table)


def open_collection(inputs: Sequence[str]) -> Collection:
    """What `densedino serve` was given: nothing, a store, or files, folders, patterns and lists of images.

    Raises:
        InputError: an input that does not exist, or a store together with something else.
        StoreError: a store that cannot be read.
    """
    folders = [Path(given) for given in inputs if (Path(given) / "_versions").is_dir()]
    if folders and len(inputs) > 1:
        raise InputError(f"{str(folders[0])!r} is a feature store; open it alone, or images without it.")
    if folders:
        store = FeatureStore(folders[0])
        if not len(store):
            raise StoreError(f"{str(folders[0])!r} has no rows yet. Fill it: densedino extract IMAGES -o {folders[0]}")
        paths = store.dataset.to_table(columns=["source"])["source"].to_pylist()
        return Collection(store.keys(), [Path(path) for path in paths], store=store)
    if not inputs:
        return Collection((), ())
    items = [item for item in list_inputs(inputs) if not item.is_video]
    if not items:
        raise InputError("there are only videos; extract their features first, and open that store.")
    return Collection([item.key for item in items], [item.path for item in items])
