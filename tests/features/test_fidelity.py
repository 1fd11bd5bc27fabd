from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import densedino as dd
from densedino.errors import InputError
from densedino.features.fidelity import Cosines, compare, compare_pictures, set_apart


@pytest.fixture
def pair(tiny):
    """`tiny` and a copy whose blocks do a little more."""
    other = dd.load("debug_vit", weights="random", device="cpu")
    with torch.no_grad():
        for block in other.model.blocks:
            block.ls1.gamma.fill_(0.52)
    return tiny, other


def test_a_model_is_itself(tiny, images) -> None:
    found = compare(tiny, tiny, [images])
    assert found.images == 12
    assert found.tokens.min == pytest.approx(1.0)
    assert found.cls.mean == pytest.approx(1.0)
    assert found.neighbours is None
    assert found.bytes_a == found.bytes_b == sum(p.nbytes for p in tiny.model.parameters())
    assert found.speed > 0


def test_a_difference_shows_in_every_number(pair, images) -> None:
    found = compare(*pair, [images])
    assert 0.9 < found.tokens.min <= found.tokens.percentile_1 <= found.tokens.mean < 1.0
    assert found.cls.min < 1.0
    assert json.loads(found.to_json())["tokens"]["min"] == found.tokens.min


def test_percentiles_are_of_the_low_end() -> None:
    found = Cosines.of(torch.linspace(0.0, 1.0, 1001))
    assert (found.min, found.percentile_1) == (0.0, pytest.approx(0.01, abs=1e-3))


def test_neighbours_are_those_of_a_labelled_folder(pair, tmp_path, write_images) -> None:
    for name, start in (("cats", 0), ("dogs", 50)):
        (tmp_path / "val").mkdir(exist_ok=True)
        write_images(tmp_path / "val" / name, 4, start=start)
    found = compare(*pair, [tmp_path / "val" / "cats"], labelled=tmp_path / "val").neighbours
    assert (found.images, found.classes) == (8, 2)
    assert 0.0 <= found.accuracy_a <= 1.0
    assert found.same >= 0.5
    with pytest.raises(InputError, match="two or more"):
        compare(*pair, [tmp_path / "val" / "cats"], labelled=tmp_path / "val" / "cats")


def test_pictures_stand_above_each_other(pair, images) -> None:
    assert compare_pictures(*pair, [images], most=3).size == (768, 512)


def test_what_cannot_be_compared_is_refused(tiny, images, tmp_path) -> None:
    half = tiny.with_transform(replace(tiny.transform, resize=16))
    with pytest.raises(InputError, match="cannot be compared"):
        compare(tiny, half, [images])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no pictures"):
        compare(tiny, tiny, [tmp_path / "empty"])


def test_images_set_apart_are_spread_and_not_seen() -> None:
    paths = [Path(f"{i:03}.png") for i in range(100)]
    seen, judged = set_apart(paths, most=60)
    assert (len(seen), len(judged)) == (60, 32)
    assert not set(seen) & set(judged)
    assert max(seen) > paths[95] and min(judged) < paths[5]
    assert set_apart(paths[:8], most=60) == (paths[:8], paths[:8])


def test_segmentation_is_told_for_both(tiny, tmp_path) -> None:
    rng = np.random.default_rng(0)
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    for number in range(8):  # 50×70: padded to 64×80; left half dark, right half light, a void line between
        labels = np.zeros((50, 70), dtype=np.uint8)
        labels[:, 35:] = 1
        pixels = rng.integers(0, 60, (50, 70, 3), dtype=np.uint8) + 180 * labels[..., None]
        labels[:, 34:36] = 9
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "images" / f"{number}.png")
        Image.fromarray(labels).save(tmp_path / "masks" / f"{number}.png")
    found = compare(tiny, tiny, [tmp_path / "images"], masks=tmp_path, void=9).segmentation
    assert (found.images, found.classes) == (2, 2)
    assert found.miou_a == found.miou_b > 0.8
    blind = dd.load("debug_vit", weights="random", device="cpu")
    with torch.no_grad():
        blind.model.patch_embed.proj.weight.zero_()
    seen = compare(tiny, blind, [tmp_path / "images"], masks=tmp_path, void=9).segmentation
    assert seen.miou_b < seen.miou_a
    with pytest.raises(InputError, match="none of the layouts"):
        compare(tiny, tiny, [tmp_path / "images"], masks=tmp_path / "images")
