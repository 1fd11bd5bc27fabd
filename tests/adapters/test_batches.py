"""Batches: counted by step, labels in register with what is seen, faults named."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import densedino as dd
from densedino.adapters.batches import Augment, CroppedPictures, StoredTokens, order
from densedino.adapters.labels import Example, read_labelled
from densedino.adapters.tasks import NOT_COUNTED, Task
from densedino.errors import InputError
from densedino.features.extract import extract
from densedino.features.store import FeatureStore

if TYPE_CHECKING:
    from pathlib import Path

SEGMENTS = Task(kind="segmentation")


@settings(max_examples=30, deadline=None)
@given(count=st.integers(1, 30), batch=st.integers(1, 12), seed=st.integers(0, 5))
def test_every_pass_takes_each_example_once(count: int, batch: int, seed: int) -> None:
    taken = [i for step in range(3 * count) for i in order(step, batch, count, seed=seed)]
    for number in range(len(taken) // count):
        assert sorted(taken[number * count : (number + 1) * count]) == list(range(count))
    assert order(2, batch, count, seed=seed) == taken[2 * batch : 3 * batch]


@pytest.fixture
def stored(masks: Path, tmp_path: Path) -> StoredTokens:
    labelled = read_labelled(masks, SEGMENTS)
    dino = dd.load("debug_vit", weights="random", engine="eager")
    extract(dino, [e.image for e in labelled.train], output=tmp_path / "store", layers=[0])
    return StoredTokens(FeatureStore(tmp_path / "store"), labelled.task, (0, 1), depth=2)


def test_stored_tokens_are_the_models_with_their_labels(stored: StoredTokens, masks: Path) -> None:
    examples = read_labelled(masks, SEGMENTS).train[:3]
    taps, targets = stored.batch(examples, seed=0, step=0)
    assert [tuple(tap.patches.shape) for tap in taps] == [(3, 4, 5, 32)] * 2
    assert targets.shape == (3, 16, 20)
    features = dd.load("debug_vit", weights="random", engine="eager")(examples[1].image, layers=[0])
    torch.testing.assert_close(taps[1].patches[1:2], features.patches, atol=2e-3, rtol=2e-3)  # kept in float16
    torch.testing.assert_close(taps[0].patches[1:2], features.layers[0].patches, atol=2e-3, rtol=2e-3)
    mask = torch.from_numpy(np.array(Image.open(examples[1].label))).long()  # type: ignore[arg-type]
    mask[mask == 255] = NOT_COUNTED
    assert torch.equal(targets[1], mask[2::4, 2::4])


def test_grids_that_differ_are_cut_alike(tmp_path: Path) -> None:
    for name, size in (("a", (64, 48)), ("b", (48, 80))):
        for sub in ("images", "masks"):
            (tmp_path / sub).mkdir(exist_ok=True)
        ramp = np.tile(np.arange(size[1], dtype=np.uint8), (size[0], 1))
        Image.fromarray(np.stack([ramp] * 3, -1)).save(tmp_path / "images" / f"{name}.png")
        Image.fromarray(ramp).save(tmp_path / "masks" / f"{name}.png")
    dino = dd.load("debug_vit", weights="random", engine="eager")
    examples = [Example(tmp_path / "images" / f"{n}.png", tmp_path / "masks" / f"{n}.png") for n in "ab"]
    extract(dino, [e.image for e in examples], output=tmp_path / "store")
    tokens = StoredTokens(FeatureStore(tmp_path / "store"), SEGMENTS, (1,), depth=2)
    (tap,), targets = tokens.batch(examples, seed=0, step=3)
    assert tap.patches.shape == (2, 3, 3, 32) and targets.shape == (2, 12, 12)
    whole = tokens.taps(examples[1])[0][0].patches
    left = int(targets[1, 0, 0]) // 16  # the label is the column
    assert torch.equal(tap.patches[1], whole[0, :, left : left + 3])


def test_features_that_are_no_numbers_name_the_image(
    stored: StoredTokens, masks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = read_labelled(masks, SEGMENTS).train[1]
    features = stored.store[example.image.as_posix()]
    features.patches[0, 0, 0, 0] = torch.nan
    monkeypatch.setattr(type(stored.store), "__getitem__", lambda self, key: features)
    with pytest.raises(InputError, match=r"images/1\.png: its features .* are not finite"):
        stored.taps(example)


def test_crops_are_counted_and_labels_are_under_them(masks: Path) -> None:
    labelled = read_labelled(masks, SEGMENTS)
    transform = dd.load("debug_vit", weights="random", engine="eager").transform
    pictures = CroppedPictures(transform, labelled.task, Augment(crop=64, jitter=0))
    pixels, targets = pictures.batch(labelled.train[:4], seed=0, step=5)
    again = CroppedPictures(transform, labelled.task, Augment(crop=64, jitter=0)).batch(
        labelled.train[:4], seed=0, step=5
    )
    assert torch.equal(pixels, again[0]) and torch.equal(targets, again[1])
    assert not torch.equal(pixels, pictures.batch(labelled.train[:4], seed=0, step=6)[0])
    assert pixels.shape == (4, 3, 64, 64) and targets.shape == (4, 16, 16)
    red = pixels[:, 0, 2::4, 2::4] > pixels[:, 1, 2::4, 2::4]
    counted = targets != NOT_COUNTED
    assert (red == (targets == 1))[counted].float().mean() > 0.93  # but for the squares' edges


def test_labels_of_another_size_are_refused_late_too(masks: Path) -> None:
    labelled = read_labelled(masks, SEGMENTS)
    transform = dd.load("debug_vit", weights="random", engine="eager").transform
    Image.fromarray(np.zeros((10, 10), np.uint8)).save(masks / "masks" / "0.png")
    with pytest.raises(InputError, match=r"masks/0\.png: it has 10×10"):
        CroppedPictures(transform, labelled.task, Augment(crop=64)).batch(labelled.train[:1], seed=0, step=0)
    with pytest.raises(InputError, match="multiple of 32"):
        Augment(crop=100)
