"""Search: images by CLS, patches grouped into boxes, negatives, and that what was asked with is no answer."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from skimage import data

import densedino as dd
from densedino.errors import InputError, StoreError
from densedino.features.extract import extract
from densedino.features.queries import Asker, Example
from densedino.features.search import (
    exact_search,
    indexed_search,
    open_store,
    patch_count,
    search_images,
    search_regions,
)

SQUARES = {"a": [(2, 3)], "b": [(1, 1), (5, 4)], "c": []}
"""(row, column) of squares of 2 × 2 patches of the cat's eye in noise."""


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("search")
    eye = Image.fromarray(data.chelsea()[110:150, 150:190]).resize((32, 32))
    for seed, (name, places) in enumerate(SQUARES.items()):
        noise = np.random.default_rng(seed).integers(90, 160, (128, 128, 1), np.uint8).repeat(3, 2)
        image = Image.fromarray(noise)
        for row, col in places:
            image.paste(eye, (16 * col, 16 * row))
        image.save(folder / f"{name}.png")
    extract(dd.load(), [folder], output=folder / "f")
    return dd.FeatureStore(folder / "f")


def key_of(store, name):
    return next(key for key in list(store.keys()) if key.endswith(f"{name}.png"))


def covers(box, place):
    """Whether a box holds the middle of the square and little more."""
    x, y, width, height = box
    middle = 16 * place[1] + 16, 16 * place[0] + 16
    return x <= middle[0] <= x + width and y <= middle[1] <= y + height and max(width, height) <= 80


@pytest.mark.parametrize("how", [exact_search, indexed_search])
def test_a_place_finds_its_likes_in_other_images_first(store, how):
    asker = Asker(store)
    asked = Example(key_of(store, "a"), (48, 32, 32, 32), True)
    found = search_regions(
        store, asker.region_vector(asked)[None], nearest=how(store), without=asker.cells(asked), top=2
    )
    assert {one.key for one in found} == {key_of(store, "b")}
    assert sorted(covers(one.box, place) for one in found for place in SQUARES["b"]) == [False, False, True, True]
    assert found[0].score >= found[1].score > 0.5 and all(one.patches for one in found)


def test_what_was_asked_with_is_first_if_it_is_not_left_out(store):
    vector = Asker(store).region_vector(Example(key_of(store, "a"), (48, 32, 32, 32), True))
    found = search_regions(store, vector[None], nearest=exact_search(store), top=1)
    assert found[0].key == key_of(store, "a") and covers(found[0].box, (2, 3))


def test_what_is_nearer_to_a_negative_is_left_out(store):
    asker = Asker(store)
    eye, noise = Example(key_of(store, "b"), (16, 16, 32, 32), True), Example(key_of(store, "c"), (40, 40), True)
    vectors = asker.region_vector(noise)[None], asker.region_vector(eye)[None]
    free = search_regions(store, vectors[0], nearest=exact_search(store), threshold=-1)
    kept = search_regions(store, vectors[0], negatives=vectors[1], nearest=exact_search(store), threshold=-1)
    assert sum(one.patches for one in free) == 3 * 64
    assert 3 * 64 - 20 < sum(one.patches for one in kept) < 3 * 64
    assert search_regions(store, vectors[0], negatives=vectors[0], nearest=exact_search(store)) == []


def test_images_by_cls_with_negatives(store):
    vectors = np.concatenate([batch["cls"] for batch in store.batches()]).astype(np.float32)
    found = search_images(store, vectors[:1], top=5)
    assert len(found) == 3 and found[0].key == store.keys()[0] and found[0].score == pytest.approx(1, abs=1e-3)
    assert found[0].box == (0, 0, 128, 128)
    assert [one.key for one in search_images(store, vectors[:1], negatives=vectors[1:], top=5)] == [store.keys()[0]]


def test_vectors_of_another_model_are_refused(store):
    with pytest.raises(InputError, match="Use the model that made the store"):
        search_regions(store, np.ones((1, 7)), nearest=exact_search(store))


def test_stores_are_opened_and_counted(store, tmp_path):
    assert isinstance(open_store(store.path), dd.FeatureStore)
    assert patch_count(store) == 3 * 64
    with pytest.raises(StoreError, match="densedino extract"):
        open_store(tmp_path)
