"""Change between two pictures: nothing for the same, the place of what is new, and not what changed everywhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

import densedino as dd
from densedino.errors import InputError
from densedino.features.change import change_picture, patch_change, photo_change


@pytest.fixture(scope="module")
def dino():
    return dd.load()


@pytest.fixture(scope="module")
def before():
    return Image.fromarray(data.coffee()).resize((256, 256))


def test_what_is_common_to_a_date_is_no_change():
    tokens = torch.randn(5, 6, 8, generator=torch.Generator().manual_seed(0))
    shifted = tokens + 3
    change = patch_change(tokens, shifted, centre=(tokens.mean((0, 1)), shifted.mean((0, 1))))
    torch.testing.assert_close(change, torch.zeros(5, 6), atol=1e-5, rtol=0)


def test_what_is_new_stands_out(dino, before):
    after = Image.fromarray((np.asarray(before) * 0.9).astype(np.uint8))  # darker as a whole
    after.paste(Image.fromarray(data.chelsea()[100:180, 150:230]).resize((64, 64)), (128, 64))
    change, threshold = photo_change(dino(before), dino(after))
    new = torch.zeros(16, 16, dtype=torch.bool)
    new[4:8, 8:12] = True
    assert change[new].mean() > threshold > change[~new].mean()
    assert change[new].mean() > 2 * change[~new].mean()
    picture = change_picture(change, dino(after), long_side=128)
    assert picture.image.size == (128, 128) and picture.scale[1] == pytest.approx(float(change.max()))


def test_the_same_is_no_change_and_padding_is_not_known(dino):
    image = Image.fromarray(data.coffee()).resize((120, 100))
    change, _ = photo_change(dino(image), dino(image))
    assert change[:6, :7].abs().max() < 1e-5
    assert change[6].isnan().all() and change[:, 7].isnan().all()


def test_other_sizes_are_refused(dino, before):
    with pytest.raises(InputError, match="one size"):
        photo_change(dino(before), dino(before.resize((128, 256))))
