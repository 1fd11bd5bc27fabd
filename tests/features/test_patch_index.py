"""The index of a store: it follows the store, finds what exact search finds, and is whole after a kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import numpy as np
import pytest

import densedino as dd
from densedino.errors import StoreError
from densedino.features.extract import extract
from densedino.features.neighbours import PatchBlock, concatenated, patch_blocks, unit
from densedino.features.patch_index import FOLDER, PatchIndex


@pytest.fixture
def store(tiny, images, tmp_path):
    extract(tiny, [images], output=tmp_path / "f")
    return dd.FeatureStore(tmp_path / "f")


def index_of(store):
    return PatchIndex(store.path / FOLDER / "patches", dim=store.metadata["embed_dim"])


def pairs(row, patch):
    return sorted(zip(row.tolist(), patch.tolist(), strict=True))


def held(index):
    table = index._dataset.to_table(columns=["row", "patch"])
    return pairs(table["row"].to_numpy(), table["patch"].to_numpy())


def there(store):
    whole = concatenated(list(patch_blocks(store)))
    return pairs(whole.row, whole.patch)


def test_it_follows_the_store_through_additions_and_changes(store, tiny, write_images, tmp_path):
    index = index_of(store)
    index.sync(store)
    assert held(index) == there(store)
    write_images(tmp_path / "images", 3, start=12)
    write_images(tmp_path / "images", 1, start=3)
    os.utime(tmp_path / "images" / "0004.png", (1, 1))
    (tmp_path / "images" / "0003.png").write_bytes((tmp_path / "images" / "0012.png").read_bytes())
    extract(tiny, ["images"], output=store.path)
    changed = dd.FeatureStore(store.path)
    assert len(changed) == 15
    added = []
    index.sync(changed, advance=added.append)
    assert held(index) == there(changed)
    assert 0 < sum(added) < len(index), "only what is new is read"
    index.sync(changed, advance=lambda count: pytest.fail("nothing is left to do"))
    assert len(dd.FeatureStore(store.path)) == 15, "the store itself is as before"


def test_a_sync_that_was_killed_is_completed_by_the_next(store):
    script = (
        "import sys, os, signal, densedino as dd\n"
        "from densedino.features import patch_index\n"
        "patch_index._COMMIT = 1\n"
        "store = dd.FeatureStore(sys.argv[1])\n"
        "index = patch_index.PatchIndex(store.path / 'search' / 'patches', dim=store.metadata['embed_dim'])\n"
        "blocks = patch_index.patch_blocks\n"
        "def few(store, rows):\n"
        "    for row in rows: yield from blocks(store, rows=[row])\n"
        "patch_index.patch_blocks = few\n"
        "done = []\n"
        "def advance(count):\n"
        "    done.append(count)\n"
        "    if len(done) == 5: os.kill(os.getpid(), signal.SIGKILL)\n"
        "index.sync(store, advance=advance)\n"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(store.path)], check=False, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    index = index_of(store)
    assert 0 < len(index) < len(there(store))
    index.sync(store)
    assert held(index) == there(store)


@pytest.fixture(scope="module")
def clustered(tmp_path_factory):
    """6,000 vectors about 60 centres, indexed; and vectors that are not in it."""
    random = np.random.default_rng(0)
    centres = random.standard_normal((60, 32))
    vectors = unit(centres[random.integers(0, 60, 6200)] + 0.4 * random.standard_normal((6200, 32))).astype(np.float16)
    index = PatchIndex(tmp_path_factory.mktemp("index") / "patches", dim=32)
    numbers = np.arange(6000)
    index.append(PatchBlock((numbers // 100).astype(np.uint64), (numbers % 100).astype(np.uint32), vectors[:6000]))
    return index, index.build(), vectors[6000:].astype(np.float32)


def test_the_index_finds_what_exact_search_finds_and_says_how_well(clustered):
    index, report, queries = clustered
    assert report == index.report and report.vectors == 6000 and not index.outdated
    truth, found = index.exact(queries, k=10), index.nearest(queries, k=10)
    shared = [
        len(set(pairs(truth.row[i], truth.patch[i])) & set(pairs(found.row[i], found.patch[i]))) / 10
        for i in range(len(queries))
    ]
    assert np.mean(shared) >= 0.95
    assert abs(np.mean(shared) - report.recall) < 0.05
    np.testing.assert_allclose(found.score, np.einsum("nd,nkd->nk", unit(queries), found.vectors), atol=2e-3)


def test_vectors_appended_after_the_index_are_found_too_until_it_is_outdated(clustered):
    index, _, queries = clustered
    new = unit(queries[:50]).astype(np.float16)
    index.append(PatchBlock(np.full(50, 999, np.uint64), np.arange(50, dtype=np.uint32), new))
    hits = index.nearest(queries[:50], k=1)
    assert (hits.row[:, 0] == 999).all()
    assert (hits.patch[:, 0] == np.arange(50)).all()
    assert not index.outdated
    many = np.repeat(new, 61, 0)
    index.append(PatchBlock(np.full(len(many), 1000, np.uint64), np.arange(len(many), dtype=np.uint32), many))
    assert index.outdated


def test_no_room_to_write_is_said(store, monkeypatch):
    index = index_of(store)

    def full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr("lance.write_dataset", full)
    with pytest.raises(StoreError, match=r"No space left.*--exact"):
        index.sync(store)
