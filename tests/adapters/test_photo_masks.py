"""Photographs from few clicks: the object against its background at the pixels, also where sizes do not fit."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from skimage import data

import densedino as dd
from densedino.adapters.few_clicks import Clicks
from densedino.adapters.photo_masks import photo_head, photo_mask, write_photo_mask
from densedino.errors import InputError


@pytest.fixture(scope="module")
def scene():
    """A piece of a cat on a piece of coffee, 200 × 280 pixels (no multiples of 16), its mask, and its features."""
    ground = Image.fromarray(data.coffee()[20:220, 0:280])
    cat = Image.fromarray(data.chelsea()[90:190, 120:240])
    ground.paste(cat, (80, 50))
    truth = np.zeros((200, 280), bool)
    truth[50:150, 80:200] = True
    return ground, truth, dd.load(resize=400)(ground)


def clicks(**points):
    return Clicks(tuple((name, np.array([point], np.float64)) for name, many in points.items() for point in many))


def test_an_object_from_a_few_points(scene):
    _, truth, features = scene
    inside, outside = [(100, 80), (140, 100), (180, 130)], [(20, 20), (250, 30), (30, 170), (240, 180), (140, 180)]
    head, classes, count = photo_head(features, clicks(foreground=inside, background=outside))
    mask = photo_mask(features, head, classes)
    assert classes == ("background", "foreground") and count == 8
    assert mask.labels.shape == mask.confidence.shape == truth.shape
    found = mask.labels == 1
    assert (found & truth).sum() / (found | truth).sum() > 0.6
    edge = np.abs(np.indices(truth.shape)[1] - 200) < 3
    assert mask.confidence[edge & truth].mean() < mask.confidence[~edge].mean(), "least sure at the border"


def test_a_sparse_mask_says_the_same_as_points_in_its_patches(scene):
    _, _, features = scene
    labels = np.zeros((200, 280), np.int64)
    labels[80, 100] = labels[100, 140] = 2
    labels[20, 20] = labels[180, 240] = 1
    by_mask = photo_head(features, labels)
    by_points = photo_head(features, clicks(**{"1": [(20, 20), (240, 180)], "2": [(100, 80), (140, 100)]}))
    assert by_mask[1:] == by_points[1:] == (("1", "2"), 4)
    one, other = (photo_mask(features, *made[:2]) for made in (by_mask, by_points))
    assert (one.labels == other.labels).mean() > 0.999
    with pytest.raises(InputError, match="100×280"):
        photo_head(features, labels[:100])


def test_points_in_the_padding_are_outside(scene):
    _, _, features = scene
    with pytest.raises(InputError, match="outside"):
        photo_head(features, clicks(a=[(20, 20)], b=[(20, 200)]))


def test_files_are_the_mask_its_confidence_and_a_sheet(scene, tmp_path):
    photo, _, features = scene
    asked = clicks(a=[(20, 20)], b=[(140, 100)])
    head, classes, _ = photo_head(features, asked)
    mask = photo_mask(features, head, classes)
    write_photo_mask(mask, tmp_path / "m.png", photo=photo, clicks=asked, heading="heading")
    with Image.open(tmp_path / "m.png") as image:
        assert image.mode == "P" and image.info["Comment"] == "0 a; 1 b"
        np.testing.assert_array_equal(np.asarray(image), mask.labels)
    with Image.open(tmp_path / "m_confidence.png") as image:
        np.testing.assert_array_equal(np.asarray(image), mask.confidence)
    with Image.open(tmp_path / "m_sheet.png") as image:
        assert image.width > 3 * 512
