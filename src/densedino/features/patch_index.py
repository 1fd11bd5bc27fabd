"""Owns the vector index of a store's patches: a side table in the store's folder with one row per patch, and its index.

A store keeps the patches of an image as one list, which no index can take. So `STORE/search/patches` is a Lance table
of its own: `row` (address of the image's row in the store), `patch` (its number on the grid), `vector` [D] float16 of
length 1. It follows the store: `sync` appends what is new and deletes what is gone, a commit at a time, so that
a killed process leaves a table that the next sync completes.
"""

from __future__ import annotations

import json
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import filelock
import lance
import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F

from densedino.errors import DenseDinoError, StoreError
from densedino.features.layout import flat
from densedino.features.neighbours import Hits, PatchBlock, concatenated, nearest_exact, patch_blocks, unit
from densedino.features.store import reading

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from densedino.features.scenes import SceneStore
    from densedino.features.store import FeatureStore

__all__ = ["FOLDER", "IndexReport", "PatchIndex"]

FOLDER = "search"
"""In a store's folder."""

_KEY = "densedino.index"
_COMMIT = 262_144  # vectors
_ROWS = 65_536  # vectors read or multiplied at once
_QUERIES = 100  # of the index' own vectors, to measure its recall
_PARTITION = 2_048  # vectors in each, about
_REBUILD = 0.5  # so many more vectors than when the index was trained: it is trained again
_SAMPLE = 64  # vectors per partition that centres are sought with
_PASSES = 12
_PROBES = (4, 8, 16, 32, 64)
_REFINE = 4  # times k candidates are compared by their own vectors
_GOOD = 0.98  # the fewest probes are taken whose recall is that


@dataclass(frozen=True, kw_only=True)
class IndexReport:
    """What an index is, and how good."""

    vectors: int
    """That it was built on."""
    partitions: int
    seconds: float
    recall: float
    """Of the ten nearest patches, the share that the index finds, over patches of the table itself."""
    probes: int
    refine: int


class PatchIndex:
    """The side table at `path`, of vectors of `dim` numbers; made if there is none.

    Raises:
        StoreError: it cannot be read, or written where it has to be.
    """

    def __init__(self, path: Path, *, dim: int) -> None:
        self.path, self.dim = path, dim
        self._schema = pa.schema(
            [("row", pa.uint64()), ("patch", pa.uint32()), ("vector", pa.list_(pa.float16(), dim))]
        )
        with _writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = filelock.FileLock(path.parent / ".lock")
            with self._lock:
                if not any((path / "_versions").glob("*.manifest")):
                    lance.write_dataset(self._schema.empty_table(), path)
        with reading(path):
            self._dataset = lance.dataset(path)

    def __len__(self) -> int:
        return int(self._dataset.count_rows())

    @property
    def report(self) -> IndexReport | None:
        """Of the index; None if there is none yet."""
        text = self._dataset.schema.metadata and self._dataset.schema.metadata.get(_KEY.encode())
        return IndexReport(**json.loads(text)) if text else None

    def sync(self, store: FeatureStore | SceneStore, *, advance: Callable[[int], None] = lambda count: None) -> None:
        """Make the table follow `store`: append new rows' patches, delete those of rows that are gone.

        Args:
            store: in whose folder this table lies.
            advance: called with the number of patches that were added.

        Raises:
            StoreError: a table cannot be read or written.
        """
        with self._lock:
            self._dataset = lance.dataset(self.path)
            have = self._rows()
            with reading(store.path):
                there = store.dataset.to_table(columns=[], with_row_address=True)["_rowaddr"].to_numpy()
            gone = np.setdiff1d(have, there)
            for start in range(0, len(gone), 1000):
                with _writing(self.path):
                    self._dataset.delete(f"row IN ({', '.join(map(str, gone[start : start + 1000].tolist()))})")
            new = np.setdiff1d(there, have)
            if not len(new):
                return
            for block in _joined(patch_blocks(store, rows=new.tolist())):
                self.append(block)
                advance(len(block.row))
            with _writing(self.path):
                if self.report and self._dataset.list_indices():
                    self._dataset.optimize.optimize_indices()
                self._dataset.cleanup_old_versions(older_than=timedelta(seconds=30))

    def append(self, block: PatchBlock) -> None:
        """Add vectors in one commit. All patches of an image belong into one call.

        Raises:
            StoreError: the disk is full, or access was lost.
        """
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(block.vectors.reshape(-1)), self.dim)
        table = pa.table([pa.array(block.row), pa.array(block.patch), vectors], schema=self._schema)
        with _writing(self.path):
            self._dataset = lance.write_dataset(table, self._dataset, mode="append")

    def build(self) -> IndexReport:
        """Index the vectors that there are, and measure the index. What is appended later is found too.

        Raises:
            StoreError: the table cannot be read or written.
        """
        start = time.perf_counter()
        with self._lock, _writing(self.path):
            centres = self._centres(max(1, round(len(self) / _PARTITION)))
            self._dataset.create_index(
                "vector",
                "IVF_RQ",
                metric="cosine",
                num_partitions=len(centres),
                ivf_centroids=centres,
                replace=True,
            )
            self._dataset = lance.dataset(self.path)
            report = self._measured(len(centres), time.perf_counter() - start)
            self._dataset.update_schema_metadata({_KEY: json.dumps(asdict(report))})
            self._dataset = lance.dataset(self.path)
        return report

    def _centres(self, count: int) -> NDArray[np.float16]:
        """Centres [count, D] of the partitions: k-means by direction, on a sample drawn by a fixed seed."""
        draw = np.random.default_rng(0).choice(len(self), min(len(self), _SAMPLE * count), replace=False)
        sample = torch.from_numpy(self._vectors(draw).astype(np.float32))
        centres = sample[:count]  # a random order
        for _ in range(_PASSES):
            nearest = torch.cat([(part @ centres.T).argmax(1) for part in sample.split(_ROWS)])
            sums = torch.zeros_like(centres).index_add_(0, nearest, sample)
            centres = torch.where((sums != 0).any(1, keepdim=True), F.normalize(sums, dim=1), centres)
        return centres.half().numpy()

    def _measured(self, partitions: int, seconds: float) -> IndexReport:
        """The report, with the least work per query that is good."""
        draw = np.random.default_rng(1).choice(len(self), min(len(self), _QUERIES), replace=False)
        queries = self._vectors(draw)
        truth = self.exact(queries, k=10)
        recall = 0.0
        for probes in _PROBES:
            found = self.nearest(queries, k=10, probes=probes)
            recall = float(np.mean([_shared(found, truth, i) for i in range(len(queries))]))
            if recall >= _GOOD or probes >= partitions:
                break
        return IndexReport(
            vectors=len(self), partitions=partitions, seconds=seconds, recall=recall, probes=probes, refine=_REFINE
        )

    def _vectors(self, places: NDArray[np.int64]) -> NDArray[np.float16]:
        column = self._dataset.take(places.tolist(), columns=["vector"])["vector"].combine_chunks()
        return flat(column).reshape(-1, self.dim)

    @property
    def outdated(self) -> bool:
        """Whether there is no index yet, or most vectors are newer than it."""
        return self.report is None or len(self) > (1 + _REBUILD) * self.report.vectors

    def nearest(self, queries: NDArray[np.floating], *, k: int, probes: int | None = None) -> Hits:
        """The `k` nearest patches to each of `queries` [n, D] by the index, also among those that it has not yet.

        Args:
            queries: need not be of length 1.
            k: how many.
            probes: partitions that are looked into; as many as were found good when the index was built, if not given.

        Raises:
            StoreError: the table cannot be read.
        """
        if probes is None:
            probes = self.report.probes if self.report else 1
        with reading(self.path):
            tables = [self._nearest(query, k, probes) for query in unit(queries)]
        fewest = min(len(table) for table in tables)
        row, patch, distance = (
            np.stack([table[name].to_numpy()[:fewest] for table in tables]) for name in ("row", "patch", "_distance")
        )
        vectors = np.stack([flat(table["vector"].combine_chunks()).reshape(-1, self.dim)[:fewest] for table in tables])
        return Hits(row=row, patch=patch, score=1 - distance, vectors=vectors)

    def _nearest(self, query: NDArray[np.float32], k: int, probes: int) -> pa.Table:
        nearest = {
            "column": "vector",
            "q": query,
            "k": k,
            "minimum_nprobes": probes,
            "maximum_nprobes": probes,
            "refine_factor": _REFINE,
        }
        return self._dataset.to_table(columns=["row", "patch", "vector", "_distance"], nearest=nearest)

    def exact(self, queries: NDArray[np.floating], *, k: int) -> Hits:
        """The same without the index.

        Raises:
            StoreError: the table cannot be read.
        """
        with reading(self.path):
            return nearest_exact(self._blocks(), queries, k=k)

    def _blocks(self) -> Iterator[PatchBlock]:
        for batch in self._dataset.to_batches(batch_size=_ROWS):
            yield PatchBlock(
                row=batch["row"].to_numpy(),
                patch=batch["patch"].to_numpy(),
                vectors=flat(batch["vector"]).reshape(-1, self.dim),
            )

    def _rows(self) -> NDArray[np.uint64]:
        """Addresses of the images that are in the table."""
        with reading(self.path):
            batches = self._dataset.to_batches(columns=["row"])
            found = [np.unique(batch["row"].to_numpy()) for batch in batches]
        return np.unique(np.concatenate(found)) if found else np.zeros(0, np.uint64)


def _shared(found: Hits, truth: Hits, i: int) -> float:
    """The share of query i's true neighbours that were found."""
    sought = set(zip(truth.row[i].tolist(), truth.patch[i].tolist(), strict=True))
    return len(sought & set(zip(found.row[i].tolist(), found.patch[i].tolist(), strict=True))) / len(sought)


def _joined(blocks: Iterator[PatchBlock]) -> Iterator[PatchBlock]:
    """Blocks of about `_COMMIT` vectors."""
    waiting: list[PatchBlock] = []
    for block in blocks:
        waiting.append(block)
        if sum(len(one.row) for one in waiting) >= _COMMIT:
            yield concatenated(waiting)
            waiting = []
    if waiting:
        yield concatenated(waiting)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn what a full disk or lost access raises into a StoreError."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, DenseDinoError):
            raise
        raise StoreError(
            f"the index {str(path)!r} cannot be written: {error}. The features are untouched; search without an index: "
            "--exact. If the index is damaged, delete that folder: the next search makes it anew."
        ) from error
