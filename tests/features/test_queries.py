"""What is searched for: places on the command line, their patches, and the store's own model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import densedino as dd
from densedino.errors import InputError
from densedino.features.extract import extract
from densedino.features.neighbours import unit
from densedino.features.queries import Asker, Example, examples_of, parse_region, region_patches
from densedino.features.tokens import Features


def features_of(height, width, *, seen=None, stride=16):
    seen = seen or (height, width)
    h, w = -(-seen[0] // stride), -(-seen[1] // stride)
    valid = torch.zeros(1, h, w, dtype=torch.bool)
    valid[:, : seen[0] // stride, : seen[1] // stride] = True
    return Features(
        patches=torch.randn(1, h, w, 8, generator=torch.Generator().manual_seed(0)),
        cls=torch.ones(1, 8),
        registers=torch.zeros(1, 0, 8),
        valid=valid,
        stride=stride,
        grids=((h, w),),
        input_sizes=(seen,),
        source_sizes=((height, width),),
    )


def test_places_are_read():
    assert parse_region("3,4") == (3, 4) and parse_region("3, 4,10.5,20") == (3, 4, 10.5, 20)
    for wrong in ("3", "3,4,5", "a,b", "-1,3", "3,4,0,5", ""):
        with pytest.raises(InputError, match=r"point|box"):
            parse_region(wrong)


def test_images_and_places_are_paired():
    firsts, others = examples_of(["a.jpg"], regions=[(1, 2), (3, 4, 5, 6)], further=["7,8", "b.jpg@1,2,3,4", "c.jpg"])
    assert firsts == [Example("a.jpg", (1, 2), False), Example("a.jpg", (3, 4, 5, 6), False)]
    assert [(one.image, one.region) for one in others] == [("a.jpg", (7, 8)), ("b.jpg", (1, 2, 3, 4)), ("c.jpg", None)]
    firsts, _ = examples_of(["a.jpg", "b.jpg"], regions=[(1, 2), (3, 4)])
    assert [one.region for one in firsts] == [(1, 2), (3, 4)]
    assert examples_of(["a@b.jpg@1,2"])[0][0].image == "a@b.jpg"
    with pytest.raises(InputError, match="3 places for 2 images"):
        examples_of(["a.jpg", "b.jpg"], regions=[(1, 2)] * 3)


@pytest.mark.parametrize(
    ("region", "expected"),
    [
        ((0, 0), [0]),
        ((15, 15), [0]),
        ((16, 15), [1]),
        ((63, 47), [11]),
        ((0, 0, 32, 16), [0, 1]),
        ((7, 7, 2, 2), [0]),
        ((9, 9, 30, 30), [5]),  # the centres 8, 8 and 40, 40 are outside
        ((0, 0, 64, 48), list(range(12))),
        (None, list(range(12))),
    ],
)
def test_the_patches_of_a_place(region, expected):
    assert region_patches(features_of(48, 64), region).tolist() == expected


def test_places_are_in_pixels_of_the_file_whatever_the_model_saw():
    small, large = features_of(48, 64), features_of(480, 640, seen=(48, 64))
    for x, y in ((0, 0), (30, 20), (63, 47)):
        assert region_patches(small, (x, y)).tolist() == region_patches(large, (10 * x, 10 * y)).tolist()


def test_places_outside_and_in_padding_are_refused():
    with pytest.raises(InputError, match="64 pixels wide"):
        region_patches(features_of(48, 64), (64, 3))
    with pytest.raises(InputError, match="padding"):
        region_patches(features_of(40, 64), (3, 39))


def test_examples_become_vectors_of_the_stores_own_model(tiny, images, tmp_path):
    extract(tiny, [images], output=tmp_path / "f")
    store = dd.FeatureStore(tmp_path / "f")
    key = store.keys()[1]
    asker = Asker(store)
    stored = Example(key, (0, 0, 64, 32), True)
    expected = unit(unit(store[1].patches[0, :2].flatten(0, 1).numpy()).mean(0))
    np.testing.assert_allclose(asker.region_vector(stored), expected, atol=1e-6)
    assert asker.cells(stored) == {(key, (row, col)) for row in range(2) for col in range(4)}
    np.testing.assert_allclose(asker.image_vector(stored), unit(store[1].cls[0].numpy()), atol=1e-6)
    assert asker.source(stored).endswith(key)
    file = Example(key, None, False)  # by the model that is loaded anew: random weights are seeded
    assert asker.extractor.card.sha256 == tiny.card.sha256
    assert asker.image_vector(file).shape == (32,) and asker.cells(file) == set()


def test_other_weights_than_the_stores_are_refused(tiny, images, tmp_path):
    extract(tiny, [images], output=tmp_path / "f", limit=1)
    store = dd.FeatureStore(tmp_path / "f")
    store.metadata["weights"]["sha256"] = "0" * 64
    with pytest.raises(InputError, match="--weights"):
        Asker(store).region_vector(Example("images/0000.png", (1, 1), False))
