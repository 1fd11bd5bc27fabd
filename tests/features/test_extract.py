"""Extraction: complete, in order, nothing twice, the same after an interruption, never fatal for a bad file."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import densedino as dd
from densedino.errors import InputError, StoreError, UnknownNameError
from densedino.features.extract import extract, store_metadata


def table(path):
    return dd.FeatureStore(path).dataset.to_table()


def test_rows_are_the_features_of_each_image_in_order(tiny, images):
    report = extract(tiny, [images])
    store = dd.FeatureStore("features")
    assert report.rows == report.total == len(store) == 12
    assert store.keys() == [f"images/{n:04d}.png" for n in range(12)]
    for key in [*store.keys()]:
        alone, stored = tiny(key), store[key]
        assert torch.allclose(stored.patches, alone.patches, atol=4e-3)
        assert torch.allclose(stored.cls, alone.cls, atol=4e-3)
        assert torch.allclose(stored.registers, alone.registers, atol=4e-3)
        assert torch.equal(stored.valid, alone.valid)
        assert (stored.grids, stored.input_sizes, stored.source_sizes) == (
            alone.grids,
            alone.input_sizes,
            alone.source_sizes,
        )
    first = store.dataset.take([2]).to_pylist()[0]
    assert first["source"] == str(Path("images/0002.png").absolute())
    assert (first["height"], first["width"], first["input_height"], first["grid_h"], first["grid_w"]) == (
        50,
        70,
        50,
        4,
        5,
    )
    assert first["source_sha256"] == hashlib.sha256(Path("images/0002.png").read_bytes()).hexdigest()


def test_metadata_say_what_made_the_numbers(tiny, images):
    extract(tiny, [images])
    store = dd.FeatureStore("features")
    assert store.metadata == store_metadata(tiny)
    assert store.metadata["untrained"] is True
    assert store.card == tiny.card
    assert store.transform == tiny.transform


def test_a_second_run_computes_nothing_and_new_files_are_added(tiny, images, tmp_path, write_images):
    extract(tiny, [images])
    before = table("features")
    version = dd.FeatureStore("features").dataset.version
    again = extract(tiny, [images, images, "images/0003.png"])
    assert (again.rows, again.plan.done, len(again.plan.jobs)) == (0, 12, 0)
    assert dd.FeatureStore("features").dataset.version == version
    write_images(tmp_path / "images", 2, start=12)
    assert extract(tiny, [images]).rows == 2
    assert table("features").slice(0, 12).equals(before)


def test_bad_files_are_quarantined_and_tried_again_when_they_change(tiny, images):
    os.truncate("images/0004.png", 100)
    Path("images/a.jpg").touch()
    good = Path("images/0005.png").read_bytes()
    Path("list.txt").write_text("images/gone.png\nimages/0000.png\nimages/0004.png\nimages/a.jpg")
    counted = []
    report = extract(tiny, ["list.txt"], advance=counted.append)
    assert [entry.key for entry in report.quarantined] == ["images/gone.png", "images/0004.png", "images/a.jpg"]
    assert sum(counted) == 4
    lines = [json.loads(line) for line in Path("features/quarantine.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == [entry.key for entry in report.quarantined]
    assert "0004.png" in lines[1]["reason"] and "damaged" in lines[1]["reason"]

    again = extract(tiny, ["list.txt"])
    assert (again.rows, again.plan.held, again.quarantined) == (0, 3, ())
    forced = extract(tiny, ["list.txt"], retry=True)
    assert [entry.key for entry in forced.quarantined] == [entry.key for entry in report.quarantined]
    assert len(Path("features/quarantine.jsonl").read_text().splitlines()) == 3

    Path("images/a.jpg").write_bytes(good)
    fixed = extract(tiny, ["list.txt"])
    assert (fixed.rows, fixed.plan.held) == (1, 2)
    assert "images/a.jpg" in dd.FeatureStore("features")
    assert "a.jpg" not in Path("features/quarantine.jsonl").read_text()


@pytest.mark.parametrize("change", ["transform.resize", "precision", "layers", "weights", "every"])
def test_other_numbers_are_not_mixed_in(tiny, images, change):
    extract(tiny, [images])
    other, options = tiny, {}
    if change == "transform.resize":
        other = dd.load("debug_vit", weights="random", resize=64)
    elif change == "precision":
        other = dd.load("debug_vit", weights="random", precision="bf16")
    elif change == "weights":
        other = dd.load("debug_vit", weights={**tiny.model.state_dict(), "cls_token": torch.ones(1, 1, 32)})
    else:
        options = {"layers": [0]} if change == "layers" else {"every": 2}
    before = table("features")
    with pytest.raises(StoreError, match=rf"{change} is .* there and .* now.*another folder"):
        extract(other, [images], **options)
    assert table("features").equals(before)


@pytest.mark.parametrize("name", ["debug_vit", "debug_convnext"])
def test_further_layers_are_kept(name, images):
    dino = dd.load(name, weights="random")
    extract(dino, [images], layers=[0, -1, 0])
    store = dd.FeatureStore("features")
    last = dino.model.depth - 1
    for key in store.keys()[:3]:
        stored, alone = store[key], dino(key, layers=[0, last])
        assert list(stored.layers) == [0, last]
        for layer in (0, last):
            assert torch.allclose(stored.layers[layer].patches, alone.layers[layer].patches, atol=4e-3)
            assert torch.allclose(stored.layers[layer].cls, alone.layers[layer].cls, atol=4e-3)


def test_batch_size_and_limit(tiny, images):
    assert extract(tiny, [images], limit=5, batch_size=2).rows == 5
    assert dd.FeatureStore("features").keys() == [f"images/{n:04d}.png" for n in range(5)]
    assert extract(tiny, [images]).rows == 7


def test_images_over_max_tokens_are_made_smaller_and_counted(tiny, images):
    small = tiny.with_transform(replace(tiny.transform, max_tokens=8))
    report = extract(small, [images])
    assert report.shrunk == 8  # 64×64 and 50×70 and 97×33 of every six
    store = dd.FeatureStore("features")
    assert all(features.grid[0] * features.grid[1] <= 8 for features in store)


def test_wrong_arguments(tiny, images):
    for options in ({"limit": 0}, {"batch_size": 0}, {"every": 0}):
        with pytest.raises(InputError, match="at least 1"):
            extract(tiny, [images], **options)
    with pytest.raises(UnknownNameError, match="safetensors"):
        extract(tiny, [images], files="npy")
    with pytest.raises(InputError, match="block indices"):
        extract(tiny, [images], layers=[7])
    with pytest.raises(InputError, match="no file or folder"):
        extract(tiny, ["imgs"])
    with pytest.raises(StoreError, match="not empty"):
        extract(tiny, [images], output="images")
    assert not Path("images/.lock").exists()
    with pytest.raises(StoreError, match="is a file"):
        extract(tiny, [images], output="images/0000.png")
    other = dd.load("debug_vit", weights="random")
    other.model.train()
    with pytest.raises(InputError, match="training mode"):
        extract(other, [images])
