"""Near-duplicates are exactly the linked pairs; a diverse choice is far apart, and the same on every call."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from skimage import data

import densedino as dd
from densedino.errors import InputError
from densedino.features.extract import extract
from densedino.features.neighbours import unit
from densedino.features.selection import diverse, duplicates, image_vectors


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(2, 30), threshold=st.floats(-0.5, 0.95))
def test_groups_are_the_connected_parts_of_the_graph_of_pairs(seed, n, threshold):
    vectors = unit(np.random.default_rng(seed).standard_normal((n, 3)))
    near = vectors @ vectors.T >= threshold
    np.fill_diagonal(near, val=True)
    reach = np.linalg.matrix_power(near.astype(float), n) > 0
    expected = {frozenset(np.flatnonzero(row).tolist()) for row in reach if row.sum() > 1}
    groups = duplicates(vectors, threshold=threshold)
    assert {frozenset(group) for group in groups} == expected
    assert all(group == sorted(group) for group in groups)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    n=st.integers(4, 40),
    count=st.integers(1, 6),
    by=st.sampled_from(["k-center", "cluster"]),
)
def test_a_choice_has_no_row_twice_and_k_center_is_within_twice_the_best(seed, n, count, by):
    vectors = unit(np.random.default_rng(seed).standard_normal((n, 4)))
    count = min(count, n)
    chosen = diverse(vectors, count=count, by=by)
    assert len(set(chosen)) == count and chosen == diverse(vectors, count=count, by=by)
    if by == "k-center" and count < n:
        distance = np.sqrt(np.maximum(2 - 2 * vectors @ vectors.T, 0))
        radius = distance[:, chosen].min(1).max()
        between = distance[np.ix_(chosen, chosen)][~np.eye(count, dtype=bool)]
        assert not len(between) or between.min() >= radius - 1e-3  # hence radius ≤ 2 · the best (Gonzalez)


def test_clusters_get_one_image_each():
    random = np.random.default_rng(0)
    centres = np.eye(4).repeat([50, 30, 5, 2], 0)
    vectors = unit(centres + 0.05 * random.standard_normal((87, 4)))
    kinds = centres.argmax(1)
    for by in ("k-center", "cluster"):
        assert sorted(kinds[diverse(vectors, count=4, by=by)].tolist()) == [0, 1, 2, 3]


def test_copies_of_photographs_are_found_and_others_are_not(tmp_path):
    photos = [
        Image.fromarray(getattr(data, name)()).resize((160, 160))
        for name in ("astronaut", "chelsea", "coffee", "rocket")
    ]
    for number, photo in enumerate(photos):
        photo.save(tmp_path / f"{number}.png")
        for turn in range(3):  # unrelated parts of the same photographs, so that the mean is of many
            photo.crop((10 * turn, 60, 100 + 10 * turn, 150)).rotate(90 * (turn + 1)).save(
                tmp_path / f"{number}_{turn}.png"
            )
    photos[1].save(tmp_path / "1_again.jpg", quality=60)
    extract(dd.load(resize=160), [tmp_path], output=tmp_path / "f")
    store = dd.FeatureStore(tmp_path / "f")
    groups = duplicates(image_vectors(store), threshold=0.95)
    keys = store.keys()
    named = [{keys[row].rpartition("/")[2] for row in group} for group in groups]
    assert {"1.png", "1_again.jpg"} in named
    assert not any({f"{a}.png", f"{b}.png"} <= group for group in named for a in range(4) for b in range(a))


def test_what_cannot_be_chosen_is_refused(tmp_path):
    vectors = unit(np.random.default_rng(0).standard_normal((5, 3)))
    with pytest.raises(InputError, match="6 images are to be chosen of 5"):
        diverse(vectors, count=6)
    with pytest.raises(InputError, match="k-center"):
        diverse(vectors, count=2, by="centre")
    with pytest.raises(InputError, match="cosine"):
        duplicates(vectors, threshold=95)
