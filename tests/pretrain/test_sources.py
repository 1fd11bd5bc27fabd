from __future__ import annotations

import os
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import lance
import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from densedino.errors import ImageError, InputError, MissingExtraError
from densedino.pretrain.crops import CropConfig
from densedino.pretrain.schedules import constant
from densedino.pretrain.settings import DataConfig, OptimizerConfig, Resolution, SourceConfig, StageConfig
from densedino.pretrain.sources import Pictures, open_source, open_sources
from densedino.pretrain.workers import worker_context


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that holds every kind of source: the same two pictures, red and green."""
    monkeypatch.chdir(tmp_path)
    Path("photos/below").mkdir(parents=True)
    red, green = Image.new("RGB", (8, 6), "#ff0000"), Image.new("RGB", (8, 6), "#00ff00")
    red.save("photos/a.png")
    green.save("photos/below/b.tif")
    encoded = [Path("photos/a.png").read_bytes(), Path("photos/below/b.tif").read_bytes()]
    Path("photos/notes.txt").write_text("not a picture")
    Path("list.txt").write_text("photos/a.png\nphotos/below/b.tif\n")
    Path("shards").mkdir()
    for i, name in enumerate(("photos/a.png", "photos/below/b.tif")):
        with tarfile.open(f"shards/{i:02d}.tar", "w") as archive:
            archive.add(name)
    Path("shards.txt").write_text("shards/00.tar\nshards/01.tar\n")
    features = datasets.Features({"image": datasets.Image()})
    rows = datasets.Dataset.from_dict({"image": [{"bytes": b, "path": None} for b in encoded]}, features)
    rows.save_to_disk("hub")
    lance.write_dataset(pa.table({"image": encoded}), "lance")
    lance.write_dataset(pa.table({"path": ["../photos/a.png", "../photos/below/b.tif"]}), "lance_paths")
    np.save("arrays.npy", np.stack([np.asarray(red), np.asarray(green)]))
    return tmp_path


PLACES = [
    "photos",
    "photos/**/*.[pt][ni][gf]",
    "photos/{a.png,below/b.tif}",
    "list.txt",
    "shards",
    "shards/{00..01}.tar",
    "shards/*.tar",
    "shards.txt",
    "hub",
    "hf://hub",
    "hf://hub::image",
    "lance",
    "lance://lance:image",
    "lance_paths",
    "arrays.npy",
]


@pytest.mark.parametrize("place", PLACES)
def test_every_place_gives_the_same_pictures(folder: Path, place: str) -> None:
    source = open_source(place)
    assert isinstance(source, Pictures) and len(source) == 2
    first, second = source.read(0), source.read(1)
    assert first.shape == second.shape == (3, 6, 8) and first.dtype == torch.uint8
    assert first[:, 0, 0].tolist() == [255, 0, 0] and second[:, 0, 0].tolist() == [0, 255, 0]
    assert len({source.name(0), source.name(1)}) == 2


def test_sources_work_in_another_process_and_folder(folder: Path) -> None:
    sources = [open_source(place) for place in PLACES]
    for source in sources:
        source.read(0)  # so that whatever is opened lazily is open
    with worker_context().Pool(1) as pool:  # what runs there must be importable: nothing of this file is
        pool.apply(os.chdir, ("/",))
        read = [pool.apply(source.read, (1,)) for source in sources]
    assert [picture[:, 0, 0].tolist() for picture in read] == [[0, 255, 0]] * len(PLACES)


def test_objects(folder: Path) -> None:
    array = np.zeros((2, 6, 8, 3), np.uint8)
    array[1, ..., 1] = 255
    picture = Image.fromarray(array[1])
    objects: list[Any] = [
        array,
        list(array),
        torch.from_numpy(array).permute(0, 3, 1, 2),
        [array[0], picture],
        [(array[0], 7), (picture, 8)],  # as torchvision's data sets have them
        [{"image": array[0]}, {"image": picture, "label": 1}],
        ["photos/a.png", Path("photos/below/b.tif")],
        datasets.load_from_disk("hub"),
    ]
    for data in objects:
        source = open_source(data)
        assert len(source) == 2 and source.read(1)[:, 0, 0].tolist() == [0, 255, 0]
    assert open_source(objects[1]).name(1) == "list#1"
    with pytest.raises(ImageError, match="list#0 is a dict without 'image'; it has: img"):
        open_source([{"img": picture}]).read(0)


def test_depth_channels_and_scale(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 48).astype(np.uint16).reshape(6, 8)
    Image.fromarray(ramp).save(tmp_path / "deep.tif")
    deep = open_source(tmp_path / "deep.tif")
    assert deep.read(0).dtype == torch.uint16 and deep.read(0).shape == (3, 6, 8), "grey is repeated"
    assert np.array_equal(deep.read(0)[2].numpy(), ramp)
    assert open_source(tmp_path / "deep.tif", in_chans=1).read(0).shape == (1, 6, 8)

    Image.fromarray(ramp // 16).save(tmp_path / "twelve.tif")
    with pytest.raises(ImageError, match="looks like 12-bit data"):
        open_source(tmp_path / "twelve.tif").read(0)
    twelve = open_source(tmp_path / "twelve.tif", max_value=4095).read(0)
    assert twelve.dtype == torch.float32 and twelve.max() == 1

    bands = open_source(np.ones((3, 6, 8, 5), np.float32), in_chans=5)
    assert bands.read(2).shape == (5, 6, 8) and bands.read(2).dtype == torch.float32
    with pytest.raises(ImageError, match="has 3 channels; the model takes 5"):
        open_source([np.zeros((6, 8, 3), np.uint8)], in_chans=5).read(0)
    with pytest.raises(ImageError, match=r"has 3 channels; the model takes 1\. Make it grey first"):
        open_source([np.zeros((6, 8, 3), np.uint8)], in_chans=1).read(0)


def test_pictures_are_upright_and_in_colours(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 6)).save(tmp_path / "a.jpg", exif=exif)
    Image.new("CMYK", (8, 6)).save(tmp_path / "b.jpg")
    Image.new("P", (8, 6)).save(tmp_path / "c.png")
    source = open_source(tmp_path)
    assert [tuple(source.read(i).shape) for i in range(3)] == [(3, 8, 6), (3, 6, 8), (3, 6, 8)]


def test_a_broken_picture_is_an_image_error(folder: Path) -> None:
    data = Path("photos/a.png").read_bytes()
    Path("photos/a.png").write_bytes(data[:50])
    with pytest.raises(ImageError, match=r"a.png' is damaged or incomplete"):
        open_source("photos").read(0)
    with pytest.raises(ImageError, match="the image in 7 bytes is text"):
        open_source([b"rubbish"]).read(0)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("photso", "no file or folder 'photso'.*Near: 'photos'"),
        ("photos/*.bmp", "nothing matches"),
        ("https://example.org/a.tar", "is a URL. Download it first"),
        ("shards/{00..07}.tar", "no tar shard 'shards/02.tar'"),
        ("shards.tar.gz", "is a compressed archive"),
        ("empty", "no pictures or videos in 'empty'"),
        ("hf://nowhere/at-all", "no Hugging Face data set 'nowhere/at-all'"),
        ("bad.npy", "is no .npy file of numbers"),
        ("flat.npy", r"has the shape \(4,\)"),
        ("zero.npy", "no pictures in 'zero.npy': it is empty"),
        ("mixed.txt", "names tar shards and pictures. Make two sources"),
    ],
)
def test_what_is_no_source_is_refused(folder: Path, place: str, message: str) -> None:
    Path("empty").mkdir()
    Path("bad.npy").write_bytes(b"not numbers")
    np.save("flat.npy", np.zeros(4))
    np.save("zero.npy", np.zeros((0, 2, 2, 3), np.uint8))
    Path("mixed.txt").write_text("photos/a.png\nshards/00.tar\n")
    with pytest.raises(InputError, match=message):
        open_source(place)


@pytest.mark.parametrize("data", [3, None, b"bytes", {"a": 1}, np.zeros(4), (x for x in "ab"), [], np.zeros((0, 2, 2))])
def test_what_is_no_sequence_is_refused(data: Any) -> None:
    with pytest.raises(InputError, match=r"no source of pictures|no stack of pictures|it is empty"):
        open_source(data)


def test_videos_are_left_out(folder: Path) -> None:
    Path("photos/clip.mp4").write_bytes(b"")
    assert len(open_source("photos")) == 2
    with pytest.raises(InputError, match=r"1 videos and no pictures.*ffmpeg"):
        open_source("photos/clip.mp4")


def test_an_array_file_is_not_sent_along(folder: Path) -> None:
    source = open_source("arrays.npy").collection
    source.get(0)
    assert source.__getstate__()["_array"] is None  # type: ignore[attr-defined]


def test_a_data_set_needs_the_extra(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'densedino\[train\]'"):
        open_source("hub")


def stages(crops: CropConfig) -> list[StageConfig]:
    optimizer = OptimizerConfig(lr=constant(1e-3))
    stage = StageConfig(
        name="one", steps=1, batch_size=1, resolutions=(Resolution(crops=crops),), optimizer=optimizer, start="random"
    )
    return [stage]


CROPS = CropConfig(mean=(0.5,) * 3, std=(0.5,) * 3)


def test_sources_of_a_run(folder: Path) -> None:
    data = DataConfig(sources=(SourceConfig(path="photos"), SourceConfig(path="arrays.npy")), max_value=255)
    sources = open_sources(data, stages=stages(CROPS))
    assert [(len(source), source.max_value, source.enough_pixels) for source in sources] == [(2, 255, None)] * 2
    with pytest.raises(InputError, match="no data: name a folder"):
        open_sources(DataConfig(), stages=stages(CROPS))


def test_large_jpegs_are_decoded_smaller_if_that_is_asked_for(tmp_path: Path) -> None:
    from skimage import data

    photo = Image.fromarray(data.coffee())
    large = photo.resize((2400, 1600), Image.Resampling.BICUBIC)
    large.save(tmp_path / "large.jpg", quality=95)
    large.save(tmp_path / "large.webp", quality=50)
    photo.save(tmp_path / "small.jpg")
    config = DataConfig(sources=(SourceConfig(path=str(tmp_path)),), fast_jpeg=True)
    (exact,) = open_sources(replace(config, fast_jpeg=False), stages=stages(CROPS))
    small = replace(CROPS, global_size=96, local_size=48)
    for crops, first in ((CROPS, (1600, 2400)), (small, (800, 1200)), (replace(small, gram_size=224), (1600, 2400))):
        (fast,) = open_sources(config, stages=stages(crops))
        assert [tuple(fast.read(i).shape[1:]) for i in range(3)] == [first, (1600, 2400), (400, 600)]
    (fast,) = open_sources(config, stages=stages(small))
    whole = [source.read(0)[None].float() for source in (exact, fast)]
    shown = [F.interpolate(x, (200, 300), mode="bicubic", antialias=True) for x in whole]
    assert (shown[0] - shown[1]).square().mean().sqrt() < 1
