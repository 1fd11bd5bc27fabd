"""Owns search: the images of a store that are like given ones, and the boxes whose patches are like given places."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from densedino.errors import InputError, StoreError
from densedino.features.layout import grids_of, valid_of
from densedino.features.neighbours import nearest_exact, patch_blocks, unit
from densedino.features.patch_index import FOLDER, PatchIndex
from densedino.features.scenes import SceneStore
from densedino.features.store import FeatureStore, open_lance, read_metadata, reading

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from pathlib import Path

    from numpy.typing import NDArray

    from densedino.features.neighbours import Hits
    from densedino.features.patch_index import IndexReport

    AnyStore = FeatureStore | SceneStore
    Nearest = Callable[[NDArray[np.floating], int], Hits]

Cell = tuple[int, int]
"""Row and column of a patch."""

__all__ = [
    "SMALL",
    "Found",
    "exact_search",
    "indexed_search",
    "open_store",
    "patch_count",
    "search_images",
    "search_regions",
]

SMALL = 200_000
"""Patches: stores of no more are searched without an index, which would not be faster than reading them."""

_SAMPLE = 16  # images, for what is usual
_NEAR = ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1))


@dataclass(frozen=True, kw_only=True)
class Found:
    """An image or a part of one."""

    key: str
    source: str
    """The file."""
    score: float
    """Cosine to the nearest example: of the image, or of the best patch."""
    box: tuple[float, float, float, float]
    """x, y, width, height in pixels of the source, from its top left; all of it for an image."""
    patches: int
    """That are in the box and like the example; 0 for an image."""


def open_store(path: Path) -> AnyStore:
    """The store at `path`, of images or of a scene.

    Raises:
        StoreError: no store, a damaged one, or one of a newer densedino.
    """
    scene = "scene" in read_metadata(open_lance(path), path=path)
    return SceneStore(path) if scene else FeatureStore(path)


def patch_count(store: AnyStore) -> int:
    """How many patches a store has, padding included."""
    with reading(store.path):
        table = store.dataset.to_table(columns=["grid_h", "grid_w"])
    return int((table["grid_h"].to_numpy().astype(np.int64) * table["grid_w"].to_numpy()).sum())


def exact_search(store: AnyStore) -> Nearest:
    """Nearest patches by reading all of them."""
    return lambda queries, k: nearest_exact(patch_blocks(store), queries, k=k)


def indexed_search(
    store: AnyStore,
    *,
    advance: Callable[[int], None] = lambda count: None,
    built: Callable[[IndexReport], None] = lambda report: None,
) -> Nearest:
    """Nearest patches by the store's index, which is brought up to date first.

    Args:
        store: its folder is written to.
        advance: called with the number of patches that were added to the index' table.
        built: called when the index was trained.

    Raises:
        StoreError: the index cannot be written.
    """
    index = PatchIndex(store.path / FOLDER / "patches", dim=store.metadata["embed_dim"])
    index.sync(store, advance=advance)
    if index.outdated:
        built(index.build())
    return lambda queries, k: index.nearest(queries, k=k)


def search_images(
    store: FeatureStore,
    positives: NDArray[np.floating],
    *,
    negatives: NDArray[np.floating] | None = None,
    top: int = 10,
) -> list[Found]:
    """The `top` images whose CLS is nearest to one of `positives` [n, D], and not nearer to one of `negatives`."""
    columns = ["key", "source", "height", "width", "cls"]
    best: list[Found] = []
    for batch in store.batches(columns=columns):
        score = _score(batch["cls"], positives, negatives)
        for i in np.argsort(-score, kind="stable")[:top]:
            if np.isfinite(score[i]):
                size = (0.0, 0.0, float(batch["width"][i]), float(batch["height"][i]))
                key, source = batch["key"][i], batch["source"][i]
                best.append(Found(key=key, source=source, score=float(score[i]), box=size, patches=0))
        best = sorted(best, key=lambda found: -found.score)[:top]
    return best


def _score(
    vectors: NDArray[np.floating], positives: NDArray[np.floating], negatives: NDArray[np.floating] | None
) -> NDArray[np.float32]:
    """Cosine [n] to the nearest positive; -inf for what is nearer to a negative."""
    vectors = unit(vectors)
    score = (vectors @ unit(positives).T).max(1)
    if negatives is not None and len(negatives):
        score[(vectors @ unit(negatives).T).max(1) >= score] = -np.inf
    return score


def search_regions(
    store: AnyStore,
    positives: NDArray[np.floating],
    *,
    nearest: Nearest,
    negatives: NDArray[np.floating] | None = None,
    without: Collection[tuple[str, Cell]] = (),
    threshold: float | None = None,
    candidates: int = 1000,
    top: int = 10,
) -> list[Found]:
    """The `top` boxes of neighbouring patches that are like one of `positives` [n, D], best first.

    Args:
        store: what is searched.
        positives: vectors of what is sought.
        nearest: `exact_search(store)` or `indexed_search(store)`.
        negatives: patches nearer to one of these than to any of `positives` are left out.
        without: (key, (row, column)) of patches that are no answer: those that were asked with.
        threshold: the least cosine of a patch; if not given, half way from what is usual in the store to 1.
        candidates: patches that are looked at, for each of `positives`.
        top: how many boxes.

    Raises:
        InputError: the vectors are not of this store's model.
        StoreError: the store cannot be read.
    """
    if positives.shape[-1] != store.metadata["embed_dim"]:
        raise InputError(
            f"the query has vectors of {positives.shape[-1]} numbers, {store} of {store.metadata['embed_dim']}. "
            "Use the model that made the store."
        )
    hits = nearest(positives, candidates)
    row, patch = hits.row.reshape(-1), hits.patch.reshape(-1)
    score = _score(hits.vectors.reshape(len(row), -1), positives, negatives)
    least = (_usual(store, positives) + 1) / 2 if threshold is None else threshold
    kept = np.flatnonzero(score >= least)
    places = {place.address: place for place in _places(store, np.unique(row[kept]).tolist())}
    cells: dict[_Picture, dict[Cell, float]] = {}
    for address, number, value in zip(row[kept].tolist(), patch[kept].tolist(), score[kept].tolist(), strict=True):
        place = places[address]
        cell = (place.origin[0] + number // place.columns, place.origin[1] + number % place.columns)
        if (place.picture.key, cell) not in without:
            cells.setdefault(place.picture, {})[cell] = value
    found = [picture.found(region) for picture, scores in cells.items() for region in _regions(scores)]
    return sorted(found, key=lambda one: -one.score)[:top]


def _usual(store: AnyStore, positives: NDArray[np.floating]) -> float:
    """The mean cosine of patches of some of the store's images to the nearest of `positives`."""
    rows = np.unique(np.linspace(0, store.dataset.count_rows() - 1, _SAMPLE).astype(int)).tolist()
    with reading(store.path):
        table = store.dataset.take(rows, columns=["grid_h", "grid_w", "patches", "valid"])
    grids = list(zip(table["grid_h"].to_pylist(), table["grid_w"].to_pylist(), strict=True))
    tokens = grids_of(table["patches"].combine_chunks(), grids)
    masks = [valid_of(bits, grid) for bits, grid in zip(table["valid"].to_pylist(), grids, strict=True)]
    vectors = np.concatenate([one[mask] for one, mask in zip(tokens, masks, strict=True)])
    return float(_score(vectors, positives, None).mean()) if len(vectors) else 0.0


@dataclass(frozen=True)
class _Picture:
    """What boxes are parts of: an image, or a scene."""

    key: str
    source: str
    size: tuple[float, float]
    """(H, W) of the source."""
    step: tuple[float, float]
    """Source pixels from patch to patch, down and across."""

    def found(self, region: dict[Cell, float]) -> Found:
        """A region as a box."""
        rows, cols = np.array(list(region)).T
        top, left = rows.min() * self.step[0], cols.min() * self.step[1]
        bottom = min((rows.max() + 1) * self.step[0], self.size[0])
        right = min((cols.max() + 1) * self.step[1], self.size[1])
        x, y, width, height = (round(float(side), 2) for side in (left, top, right - left, bottom - top))
        box = (x, y, width, height)
        return Found(key=self.key, source=self.source, score=max(region.values()), box=box, patches=len(region))


@dataclass(frozen=True)
class _Place:
    """Where the patches of a row are."""

    address: int
    picture: _Picture
    origin: Cell
    """Of the row's first patch in the picture's grid."""
    columns: int


def _places(store: AnyStore, addresses: list[int]) -> list[_Place]:
    if not addresses:
        return []
    stride, scene = store.metadata["stride"], store.metadata.get("scene")
    sizes = ["height", "width", "input_height", "input_width"]
    columns = ["row", "col", "grid_w"] if scene else ["key", "source", "grid_w", *sizes]
    with reading(store.path):
        chosen = f"_rowaddr IN ({', '.join(map(str, addresses))})"
        rows = store.dataset.to_table(columns=columns, filter=chosen, with_row_address=True).to_pylist()
    if len(rows) < len(addresses):
        raise StoreError(f"{str(store.path)!r} was changed while it was searched. Search again.")
    if scene:
        height, width = scene["size"]
        source = scene["sources"][0]["path"]
        whole = _Picture(source, source, (height, width), (stride, stride))
        return [_Place(one["_rowaddr"], whole, (one["row"], one["col"]), one["grid_w"]) for one in rows]
    places = []
    for one in rows:
        height, width, seen_height, seen_width = (one[name] for name in sizes)
        step = (stride * height / seen_height, stride * width / seen_width)
        picture = _Picture(one["key"], one["source"], (height, width), step)
        places.append(_Place(one["_rowaddr"], picture, (0, 0), one["grid_w"]))
    return places


def _regions(scores: dict[Cell, float]) -> list[dict[Cell, float]]:
    """Patches as groups of neighbours, diagonal ones too."""
    left = dict(scores)
    regions = []
    while left:
        start, value = left.popitem()
        region, edge = {start: value}, [start]
        while edge:
            row, col = edge.pop()
            for down, right in _NEAR:
                cell = (row + down, col + right)
                if cell in left:
                    region[cell] = left.pop(cell)
                    edge.append(cell)
        regions.append(region)
    return regions
