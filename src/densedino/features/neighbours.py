"""Owns exact nearest neighbours among the patches of a store, all of which are read, in bounded memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from densedino.features.layout import grids_of, valid_of
from densedino.features.store import reading

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Sequence

    from numpy.typing import NDArray

    from densedino.features.scenes import SceneStore
    from densedino.features.store import FeatureStore

__all__ = ["Hits", "PatchBlock", "concatenated", "nearest_exact", "patch_blocks", "unit"]

_ROWS = 64  # images read at once
_BLOCK = 65_536  # vectors multiplied at once


@dataclass(frozen=True)
class PatchBlock:
    """Some valid patches of some images."""

    row: NDArray[np.uint64]
    """[n]: Lance's address of the image's row, which no other row ever has."""
    patch: NDArray[np.uint32]
    """[n]: number of the patch on the image's grid, row by row."""
    vectors: NDArray[np.float16]
    """[n, D], of length 1."""


@dataclass(frozen=True)
class Hits:
    """The patches nearest to each of n queries, best first; fewer than k where there are fewer patches."""

    row: NDArray[np.uint64]
    """[n, k]."""
    patch: NDArray[np.uint32]
    """[n, k]."""
    score: NDArray[np.float32]
    """[n, k]: cosine."""
    vectors: NDArray[np.float16]
    """[n, k, D]."""


def concatenated(blocks: Sequence[PatchBlock]) -> PatchBlock:
    """Blocks as one."""
    return PatchBlock(
        row=np.concatenate([one.row for one in blocks]),
        patch=np.concatenate([one.patch for one in blocks]),
        vectors=np.concatenate([one.vectors for one in blocks]),
    )


def unit(vectors: NDArray[np.floating]) -> NDArray[np.float32]:
    """`vectors` [..., D] with length 1; a vector of zeros stays."""
    vectors = vectors.astype(np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def patch_blocks(store: FeatureStore | SceneStore, *, rows: Collection[int] | None = None) -> Iterator[PatchBlock]:
    """All valid patches of a store, or of the rows with these addresses, in the order of the rows.

    Raises:
        StoreError: the store is damaged.
    """
    wanted = None if rows is None else np.fromiter(rows, np.uint64, len(rows))
    fragments = None
    if wanted is not None:
        numbers = set((wanted >> np.uint64(32)).tolist())
        fragments = [one for one in store.dataset.get_fragments() if one.fragment_id in numbers]
        if not fragments:
            return
    columns = ["grid_h", "grid_w", "patches", "valid"]
    with reading(store.path):
        scanner = store.dataset.scanner(columns=columns, with_row_address=True, batch_size=_ROWS, fragments=fragments)
        for batch in scanner.to_batches():
            address = batch["_rowaddr"].to_numpy()
            grids = list(zip(batch["grid_h"].to_pylist(), batch["grid_w"].to_pylist(), strict=True))
            parts = zip(address, grids_of(batch["patches"], grids), batch["valid"].to_pylist(), grids, strict=True)
            kept = [part for part in parts if wanted is None or part[0] in wanted]
            masks = [valid_of(bits, grid).reshape(-1) for _, _, bits, grid in kept]
            if not any(mask.any() for mask in masks):
                continue
            tokens = [grid.reshape(len(mask), -1)[mask] for (_, grid, _, _), mask in zip(kept, masks, strict=True)]
            yield PatchBlock(
                row=np.repeat(np.array([part[0] for part in kept], np.uint64), [len(part) for part in tokens]),
                patch=np.concatenate([np.flatnonzero(mask) for mask in masks]).astype(np.uint32),
                vectors=unit(np.concatenate(tokens)).astype(np.float16),
            )


def nearest_exact(blocks: Iterable[PatchBlock], queries: NDArray[np.floating], *, k: int) -> Hits:
    """The `k` patches of `blocks` with the largest cosine to each of `queries` [n, D]."""
    asked = unit(queries)
    n, dim = asked.shape
    best = Hits(
        row=np.zeros((n, 0), np.uint64),
        patch=np.zeros((n, 0), np.uint32),
        score=np.zeros((n, 0), np.float32),
        vectors=np.zeros((n, 0, dim), np.float16),
    )
    for block in blocks:
        for start in range(0, len(block.row), _BLOCK):
            vectors = block.vectors[start : start + _BLOCK]
            cosine = torch.from_numpy(asked) @ torch.from_numpy(vectors.astype(np.float32)).T
            scores, found = cosine.topk(min(k, len(vectors)), dim=1)
            places = found.numpy() + start
            best = _best(best, Hits(block.row[places], block.patch[places], scores.numpy(), block.vectors[places]), k)
    return best


def _best(one: Hits, other: Hits, k: int) -> Hits:
    """The `k` best of both."""
    order = np.argsort(-np.concatenate([one.score, other.score], 1), axis=1, kind="stable")[:, :k]

    def joined(a: NDArray[Any], b: NDArray[Any]) -> NDArray[Any]:
        return np.take_along_axis(np.concatenate([a, b], 1), order, 1)

    vectors = np.concatenate([one.vectors, other.vectors], 1)[np.arange(len(order))[:, None], order]
    return Hits(joined(one.row, other.row), joined(one.patch, other.patch), joined(one.score, other.score), vectors)
