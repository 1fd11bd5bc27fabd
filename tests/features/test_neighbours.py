"""Exact nearest neighbours, against a sort of all cosines."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

import densedino as dd
from densedino.features.extract import extract
from densedino.features.neighbours import PatchBlock, concatenated, nearest_exact, patch_blocks, unit


def blocks(vectors, sizes):
    start = 0
    for number, size in enumerate(sizes):
        part = vectors[start : start + size]
        rows = np.full(len(part), number, np.uint64)
        yield PatchBlock(rows, np.arange(start, start + len(part), dtype=np.uint32), part)
        start += size


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1000),
    sizes=st.lists(st.integers(1, 20), min_size=1, max_size=6),
    k=st.integers(1, 30),
    n=st.integers(1, 4),
)
def test_the_k_largest_cosines_whatever_the_blocks(seed, sizes, k, n):
    random = np.random.default_rng(seed)
    vectors = unit(random.standard_normal((sum(sizes), 8))).astype(np.float16)
    queries = random.standard_normal((n, 8))
    hits = nearest_exact(blocks(vectors, sizes), queries, k=k)
    cosine = unit(queries) @ vectors.astype(np.float32).T
    expected = -np.sort(-cosine, axis=1)[:, :k]
    np.testing.assert_allclose(hits.score, expected, atol=1e-5)
    for i in range(n):
        assert len(set(hits.patch[i].tolist())) == hits.patch.shape[1]
        np.testing.assert_allclose(cosine[i, hits.patch[i]], hits.score[i], atol=1e-5)
        np.testing.assert_array_equal(hits.vectors[i], vectors[hits.patch[i]])


def test_a_vector_of_zeros_stays_and_others_have_length_one():
    np.testing.assert_allclose(unit(np.array([[0.0, 0.0], [3.0, 4.0]])), [[0, 0], [0.6, 0.8]], atol=1e-7)


def test_blocks_of_a_store_are_its_valid_patches(tiny, images, tmp_path):
    extract(tiny, [images], output=tmp_path / "f")
    store = dd.FeatureStore(tmp_path / "f")
    whole = concatenated(list(patch_blocks(store)))
    assert len(whole.row) == sum(int(one.valid.sum()) for one in store)
    addresses = np.unique(whole.row)
    assert len(addresses) == len(store)
    one = concatenated(list(patch_blocks(store, rows=[int(addresses[5])])))
    features = store[5]
    expected = unit(features.patches[features.valid].numpy()).astype(np.float16)
    np.testing.assert_array_equal(one.vectors, expected)
    np.testing.assert_array_equal(one.patch, np.flatnonzero(features.valid[0].numpy()))
    assert list(patch_blocks(store, rows=[1 << 40])) == []
