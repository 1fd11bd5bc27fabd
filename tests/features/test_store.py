"""Reading a store: by key, row and batch, into NumPy, torch and xarray; and what is said of a folder that is none."""

from __future__ import annotations

import json
import os
import pickle
import shutil

import lance
import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

import densedino as dd
from densedino.errors import StoreError
from densedino.features.extract import extract
from densedino.features.layout import METADATA_KEY

SIZES = [(32, 48), (64, 64), (50, 70), (32, 48), (97, 33)]  # (H, W)


@pytest.fixture(scope="module")
def dino():
    dino = dd.load("debug_vit", weights="random")
    for block in dino.model.blocks:  # random weights begin with blocks that do next to nothing
        torch.nn.init.constant_(block.ls1.gamma, 0.5)
    return dino


@pytest.fixture(scope="module")
def path(dino, tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    files = []
    for number, (height, width) in enumerate(SIZES):
        pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
        files.append(folder / f"{number}.png")
        Image.fromarray(pixels).save(files[-1])
    extract(dino, files, output=folder / "features", layers=[0])
    return folder / "features"


@pytest.fixture
def copy(path, tmp_path):
    return shutil.copytree(path, tmp_path / "copy")


def test_keys_and_rows(path):
    store = dd.FeatureStore(path)
    keys = store.keys()
    assert len(store) == len(keys) == 5
    assert keys[2] in store
    assert "other" not in store
    assert torch.equal(store[2].patches, store[keys[2]].patches)
    assert torch.equal(store[-1].cls, store[4].cls)
    assert [features.grid for features in store] == [(2, 3), (4, 4), (4, 5), (2, 3), (7, 3)]
    assert "UNTRAINED" in repr(store)
    with pytest.raises(IndexError):
        store[5]
    with pytest.raises(StoreError, match=r"no key 'x'.*0\.png"):
        store["x"]


def test_numpy_is_a_view(path):
    store = dd.FeatureStore(path)
    patches = store.numpy(2)
    assert (patches.shape, patches.dtype) == ((4, 5, 32), np.float16)
    assert not patches.flags.writeable
    assert not patches.flags.owndata
    assert np.array_equal(patches.astype(np.float32), store[2].patches[0].numpy())


@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_batches_have_the_columns_asked_for(path, batch_size):
    store = dd.FeatureStore(path)
    names = ("key", "cls", "patches", "registers", "valid", "height", "patches_layer0", "cls_layer0")
    seen = 0
    for batch in store.batches(columns=names, batch_size=batch_size):
        assert tuple(batch) == names
        for i, key in enumerate(batch["key"]):
            one = store[key]
            assert np.array_equal(batch["cls"][i], one.cls[0].numpy())
            assert np.array_equal(batch["patches"][i], one.patches[0].numpy())
            assert np.array_equal(batch["patches_layer0"][i], one.layers[0].patches[0].numpy())
            assert np.array_equal(batch["cls_layer0"][i], one.layers[0].cls[0].numpy())
            assert np.array_equal(batch["registers"][i], one.registers[0].numpy())
            assert np.array_equal(batch["valid"][i], one.valid[0].numpy())
            assert batch["height"][i] == one.source_sizes[0][0]
            seen += 1
    assert seen == 5
    with pytest.raises(StoreError, match=r"no column 'patch'.*It has: key"):
        next(store.batches(columns=["patch"]))


def test_a_convnext_store_has_empty_registers(dino, path, tmp_path):
    image = next(path.parent.glob("1.png"))
    extract(dd.load("debug_convnext", weights="random"), [image], output=tmp_path / "f")
    store = dd.FeatureStore(tmp_path / "f")
    assert store[0].registers.shape == (1, 0, 32)
    assert next(store.batches(columns=["registers"]))["registers"][0].shape == (0, 32)


@pytest.mark.parametrize("workers", [0, 2])
def test_torch_dataset_in_worker_processes(path, workers):
    store = dd.FeatureStore(path)
    rows = store.torch_dataset()
    assert rows[0]["patches"].shape == (2, 3, 32)  # opened in this process: workers must not use it
    context = "forkserver" if workers else None  # what Lance asks for: its threads do not live through a fork
    loader = torch.utils.data.DataLoader(
        rows, batch_size=None, num_workers=workers, multiprocessing_context=context, timeout=60 if workers else 0
    )
    got = list(loader)
    assert [row["key"] for row in got] == store.keys()
    for row, features in zip(got, store, strict=True):
        assert row["patches"].dtype == torch.float16
        assert torch.equal(row["patches"].float(), features.patches[0])
        assert torch.equal(row["valid"], features.valid[0])
        assert torch.equal(row["cls"].float(), features.cls[0])
    assert len(pickle.loads(pickle.dumps(rows))) == 5
    with pytest.raises(IndexError):
        rows[5]


def test_xarray_has_pixel_centres_of_the_source(path, dino, tmp_path):
    array = dd.FeatureStore(path).xarray(2)
    assert array.dims == ("y", "x", "channel")
    assert array.y.values.tolist() == [8, 24, 40, 56]
    assert array.x.values.tolist() == [8, 24, 40, 56, 72]
    assert not array.valid.values[-1].any()
    assert array.valid.values[0, 0]
    assert array.attrs["untrained"]
    half = dd.load("debug_vit", weights="random", resize=(32, 32))
    extract(half, [path.parent / "1.png"], output=tmp_path / "half")
    assert dd.FeatureStore(tmp_path / "half").xarray(0).x.values.tolist() == [16, 48]


def test_lance_finds_neighbours_by_cls(path):
    store = dd.FeatureStore(path)
    query = store[3].cls[0].numpy()
    found = store.dataset.to_table(columns=["key", "_distance"], nearest={"column": "cls", "q": query, "k": 1})
    assert found["key"].to_pylist() == [store.keys()[3]]


def test_what_is_no_store(path, tmp_path):
    with pytest.raises(StoreError, match=r"does not exist.*densedino extract"):
        dd.FeatureStore(tmp_path / "none")
    with pytest.raises(StoreError, match=r"has no feature store.*densedino extract"):
        dd.FeatureStore(tmp_path)
    with pytest.raises(StoreError, match=r"is a file"):
        dd.FeatureStore(path.parent / "0.png")
    lance.write_dataset(pa.table({"a": [1]}), tmp_path / "other")
    with pytest.raises(StoreError, match="densedino did not write it"):
        dd.FeatureStore(tmp_path / "other")
    with pytest.raises(StoreError, match="densedino did not write it"):
        extract(dd.load("debug_vit", weights="random"), [path.parent / "0.png"], output=tmp_path / "other")


def test_a_newer_format_is_refused(path, tmp_path):
    dataset = dd.FeatureStore(path).dataset
    metadata = json.loads(dataset.schema.metadata[METADATA_KEY]) | {"format": 99, "densedino": "9.9"}
    schema = dataset.schema.with_metadata({METADATA_KEY: json.dumps(metadata)})
    lance.write_dataset(schema.empty_table(), tmp_path / "newer")
    with pytest.raises(StoreError, match=r"densedino 9\.9 in format 99.*--upgrade"):
        dd.FeatureStore(tmp_path / "newer")


def test_damage_is_an_error_that_says_where(copy):
    store = dd.FeatureStore(copy)
    (data,) = (copy / "data").iterdir()
    os.truncate(data, data.stat().st_size // 2)
    with pytest.raises(StoreError, match=r"cannot be read.*again"):
        dd.FeatureStore(copy)[0]
    data.unlink()
    with pytest.raises(StoreError, match=r"cannot be read.*again"):
        dd.FeatureStore(copy)
    del store
    for manifest in (copy / "_versions").iterdir():
        os.truncate(manifest, manifest.stat().st_size // 2)
    with pytest.raises(StoreError, match="cannot be read"):
        dd.FeatureStore(copy)
