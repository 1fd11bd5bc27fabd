"""How fast the index of a million patches is built, how fast it answers, and how many true neighbours it finds.

    densedino extract ../shared/data/imagenette/train -o store --limit 5400
    python benchmarks/search.py --store store --vectors 1000000

The vectors are the first patches of a real store. Queries are directions that are not in the table: the mean of a patch
and its right neighbour in images behind those that are indexed, or, if the store ends there, in the table's own. Exact
search is the same product over all vectors as `--exact` does. Processor seconds are printed too: on a machine that
others use at the same time, they divided by the number of cores are the steadier figure. Query times are of a warm
process, one query at a time, medians.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

import densedino as dd
from densedino.features.neighbours import PatchBlock, concatenated, patch_blocks
from densedino.features.patch_index import PatchIndex


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--vectors", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=200)
    args = parser.parse_args()
    store = dd.FeatureStore(args.store)
    with tempfile.TemporaryDirectory(dir=args.store.parent) as folder:
        index = PatchIndex(Path(folder) / "patches", dim=store.metadata["embed_dim"])
        queries = fill(index, store, count=args.vectors, queries=args.queries)
        print(f"{len(index):,} vectors of {index.dim} numbers, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
        measure(index, queries)


def fill(index: PatchIndex, store: dd.FeatureStore, *, count: int, queries: int) -> np.ndarray:
    """Put the first `count` patches of the store into the table; return vectors of what comes after."""
    start, held = time.perf_counter(), 0
    waiting: list[PatchBlock] = []
    asked: list[np.ndarray] = []
    for block in patch_blocks(store):
        if held >= count:
            asked.append(means(block))
            continue
        held += len(block.row)
        waiting.append(block)
        if len(waiting) == 20 or held >= count:
            index.append(concatenated(waiting))
            waiting = []
    if waiting:
        index.append(concatenated(waiting))
    print(f"table written in {time.perf_counter() - start:.1f} s")
    pool = np.concatenate(asked) if asked else means(next(patch_blocks(store)))
    return pool[np.random.default_rng(0).choice(len(pool), queries, replace=False)]


def means(block: PatchBlock) -> np.ndarray:
    """Of each patch and the next one of its image."""
    vectors = block.vectors.astype(np.float32)
    return (vectors[:-1] + vectors[1:])[block.row[:-1] == block.row[1:]]


def measure(index: PatchIndex, queries: np.ndarray) -> None:
    processor = time.process_time()
    report = index.build()
    processor = time.process_time() - processor
    print(
        f"index of {report.partitions} parts built in {report.seconds:.1f} s, {processor:.0f} processor seconds "
        f"with measuring it; {report.probes} parts looked into, recall@10 of the table's patches {report.recall:.3f}"
    )
    truth, exact_ms = [], []
    found, index_ms = [], []
    index.nearest(queries[:10], k=10)
    for query in queries:
        start = time.perf_counter()
        hits = index.nearest(query[None], k=10)
        index_ms.append(1000 * (time.perf_counter() - start))
        found.append(set(zip(hits.row[0].tolist(), hits.patch[0].tolist(), strict=True)))
    hits = index.exact(queries, k=10)
    truth = [set(zip(*pair, strict=True)) for pair in zip(hits.row.tolist(), hits.patch.tolist(), strict=True)]
    for query in queries[:5]:
        start = time.perf_counter()
        index.exact(query[None], k=10)
        exact_ms.append(1000 * (time.perf_counter() - start))
    recall = statistics.mean(len(one & other) / 10 for one, other in zip(found, truth, strict=True))
    print(
        f"top 10 of unseen queries: {statistics.median(index_ms):.1f} ms (fastest {min(index_ms):.1f}, 95 % below "
        f"{np.quantile(index_ms, 0.95):.1f}), exact {statistics.median(exact_ms):.0f} ms; recall@10 {recall:.3f}"
    )


if __name__ == "__main__":
    main()
