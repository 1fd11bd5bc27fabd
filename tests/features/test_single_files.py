"""One file per image: the same arrays as in a store, resumed, under the output folder whatever the key."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

import densedino as dd
from densedino.errors import StoreError
from densedino.features.extract import extract
from densedino.features.single_files import FileSink


@pytest.fixture(scope="module")
def dino():
    return dd.load("debug_vit", weights="random")


@pytest.fixture
def images(tmp_path, monkeypatch):
    (tmp_path / "work" / "images" / "deep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    for number, name in enumerate(("a.png", "deep/b.png", "c.jpg")):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 32 + number, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(f"images/{name}")
    return tmp_path / "work"


def read(path):
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as archive:
            arrays = dict(archive)
        return arrays, json.loads(str(arrays.pop("metadata")))
    with safe_open(path, framework="np") as archive:
        return {name: archive.get_tensor(name) for name in sorted(archive.keys())}, json.loads(
            archive.metadata()["densedino"]
        )


@pytest.mark.parametrize("files", ["npz", "safetensors"])
def test_the_files_hold_what_the_store_holds(dino, images, files):
    extract(dino, ["images"], output="store", layers=[0])
    report = extract(dino, ["images"], output="files", files=files, layers=[0])
    assert report.total == 3
    found = sorted(str(path.relative_to(images)) for path in (images / "files").rglob(f"*.{files}"))
    assert found == [f"files/images/{name}.{files}" for name in ("a.png", "c.jpg", "deep/b.png")]
    store = dd.FeatureStore("store")
    for key in sorted(store.keys()):
        arrays, metadata = read(images / "files" / f"{key}.{files}")
        assert np.array_equal(arrays["patches"], store.numpy(key))
        assert np.array_equal(arrays["cls"], store[key].cls[0].numpy())
        assert np.array_equal(arrays["valid"], store[key].valid[0].numpy())
        assert np.array_equal(arrays["patches_layer0"], store[key].layers[0].patches[0].numpy())
        row = store.dataset.to_table(filter=f"key = '{key}'").to_pylist()[0]
        assert metadata["source_sha256"] == row["source_sha256"]
        assert metadata["store"] == store.metadata
    assert extract(dino, ["images"], output="files", files=files, layers=[0]).rows == 0
    (images / "files" / f"images/a.png.{files}").unlink()
    Image.new("RGB", (64, 64)).save("images/c.jpg")
    assert extract(dino, ["images"], output="files", files=files, layers=[0]).rows == 2
    assert read(images / "files" / f"images/c.jpg.{files}")[0]["patches"].shape == (4, 4, 32)


def test_formats_are_not_mixed(dino, images):
    extract(dino, ["images"], output="files", files="npz")
    with pytest.raises(StoreError, match="holds npz files, not safetensors"):
        extract(dino, ["images"], output="files", files="safetensors")
    with pytest.raises(StoreError, match="folder of single files"):
        extract(dino, ["images"], output="files")
    with pytest.raises(StoreError, match="folder of single files"):
        dd.FeatureStore("files")
    with pytest.raises(StoreError, match="precision is fp32 there and bf16 now"):
        extract(dd.load("debug_vit", weights="random", precision="bf16"), ["images"], output="files", files="npz")
    extract(dino, ["images"], output="store")
    with pytest.raises(StoreError, match="not empty"):
        extract(dino, ["images"], output="store", files="npz")


@pytest.mark.parametrize(
    "key", ["../a.png", "/abs/a.png", "a/../../b.png", "C:\\x\\a.png", "./a.png", "clip.mp4#frame=000001"]
)
def test_no_key_leaves_the_folder(tmp_path, key):
    sink = FileSink(tmp_path / "out", "npz", {"fingerprint": "", "format": 1})
    path = sink.file(key)
    assert ".." not in path.parts
    assert path.is_relative_to(tmp_path / "out")
