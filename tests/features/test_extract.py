"""Extraction: complete, in order, nothing twice, the same after an interruption, never fatal for a bad file."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

import densedino as dd
from densedino.errors import InputError, StoreError, UnknownNameError
from densedino.features import pipeline
from densedino.features.extract import extract, store_metadata
from densedino.features.planning import Settings

SIZES = [(32, 48), (64, 64), (50, 70), (64, 64), (32, 48), (97, 33)]  # (H, W)


@pytest.fixture(scope="module")
def dino():
    dino = dd.load("debug_vit", weights="random")
    for block in dino.model.blocks:  # random weights begin with blocks that do next to nothing
        torch.nn.init.constant_(block.ls1.gamma, 0.5)
    return dino


def write_images(folder, count, *, start=0):
    folder.mkdir(exist_ok=True)
    for number in range(start, start + count):
        height, width = SIZES[number % len(SIZES)]
        pixels = np.random.default_rng(number).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((width, height)).save(folder / f"{number:04d}.png")
    return folder


@pytest.fixture
def images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "images", 12)
    return "images"


def small_segments(monkeypatch, **changes):
    choose = Settings.choose

    def chosen(*args, **kwargs):
        return replace(choose(*args, **kwargs), **changes)

    monkeypatch.setattr(Settings, "choose", chosen)


def table(path):
    return dd.FeatureStore(path).dataset.to_table()


def test_rows_are_the_features_of_each_image_in_order(dino, images):
    report = extract(dino, [images])
    store = dd.FeatureStore("features")
    assert report.rows == report.total == len(store) == 12
    assert store.keys() == [f"images/{n:04d}.png" for n in range(12)]
    for key in [*store.keys()]:
        alone, stored = dino(key), store[key]
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


def test_metadata_say_what_made_the_numbers(dino, images):
    extract(dino, [images])
    store = dd.FeatureStore("features")
    assert store.metadata == store_metadata(dino)
    assert store.metadata["untrained"] is True
    assert store.card == dino.card
    assert store.transform == dino.transform


def test_a_second_run_computes_nothing_and_new_files_are_added(dino, images, tmp_path):
    extract(dino, [images])
    before = table("features")
    version = dd.FeatureStore("features").dataset.version
    again = extract(dino, [images, images, "images/0003.png"])
    assert (again.rows, again.plan.done, len(again.plan.jobs)) == (0, 12, 0)
    assert dd.FeatureStore("features").dataset.version == version
    write_images(tmp_path / "images", 2, start=12)
    assert extract(dino, [images]).rows == 2
    assert table("features").slice(0, 12).equals(before)


def test_a_changed_file_is_computed_again_a_touched_one_is_not(dino, images, tmp_path):
    extract(dino, [images])
    os.utime("images/0001.png", ns=(1, 1))
    Image.new("RGB", (80, 16), (9, 200, 30)).save("images/0002.png")
    seen = []
    report = extract(dino, [images], announce=seen.append)
    assert report.rows == 1
    assert seen[0].stale == ("images/0002.png",)
    store = dd.FeatureStore("features")
    assert len(store) == 12
    assert store["images/0002.png"].source_sizes == ((16, 80),)
    assert extract(dino, [images]).rows == 0


def test_another_file_under_the_same_key_is_refused(dino, images, tmp_path, monkeypatch):
    extract(dino, [images])
    write_images(tmp_path / "elsewhere", 0)
    write_images(tmp_path / "elsewhere" / "images", 3, start=1)
    (tmp_path / "elsewhere" / "images" / "0001.png").rename(tmp_path / "elsewhere" / "images" / "0000.png")
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match=r"another picture.*absolute paths"):
        extract(dino, ["images"], output=tmp_path / "features")


def test_bad_files_are_quarantined_and_tried_again_when_they_change(dino, images):
    os.truncate("images/0004.png", 100)
    Path("images/a.jpg").touch()
    good = Path("images/0005.png").read_bytes()
    Path("list.txt").write_text("images/gone.png\nimages/0000.png\nimages/0004.png\nimages/a.jpg")
    counted = []
    report = extract(dino, ["list.txt"], advance=counted.append)
    assert [entry.key for entry in report.quarantined] == ["images/gone.png", "images/0004.png", "images/a.jpg"]
    assert sum(counted) == 4
    lines = [json.loads(line) for line in Path("features/quarantine.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == [entry.key for entry in report.quarantined]
    assert "0004.png" in lines[1]["reason"] and "damaged" in lines[1]["reason"]

    again = extract(dino, ["list.txt"])
    assert (again.rows, again.plan.held, again.quarantined) == (0, 3, ())
    forced = extract(dino, ["list.txt"], retry=True)
    assert [entry.key for entry in forced.quarantined] == [entry.key for entry in report.quarantined]
    assert len(Path("features/quarantine.jsonl").read_text().splitlines()) == 3

    Path("images/a.jpg").write_bytes(good)
    fixed = extract(dino, ["list.txt"])
    assert (fixed.rows, fixed.plan.held) == (1, 2)
    assert "images/a.jpg" in dd.FeatureStore("features")
    assert "a.jpg" not in Path("features/quarantine.jsonl").read_text()


@pytest.mark.parametrize("change", ["transform.resize", "precision", "layers", "weights", "every"])
def test_other_numbers_are_not_mixed_in(dino, images, change):
    extract(dino, [images])
    other, options = dino, {}
    if change == "transform.resize":
        other = dd.load("debug_vit", weights="random", resize=64)
    elif change == "precision":
        other = dd.load("debug_vit", weights="random", precision="bf16")
    elif change == "weights":
        other = dd.load("debug_vit", weights={**dino.model.state_dict(), "cls_token": torch.ones(1, 1, 32)})
    else:
        options = {"layers": [0]} if change == "layers" else {"every": 2}
    before = table("features")
    with pytest.raises(StoreError, match=rf"{change} is .* there and .* now.*another folder"):
        extract(other, [images], **options)
    assert table("features").equals(before)


def test_what_float16_cannot_hold_is_quarantined(images):
    dino = dd.load("debug_vit", weights="random")
    with torch.no_grad():
        dino.model.norm.weight.fill_(1e6)
    report = extract(dino, [images])
    assert report.total == 0
    assert len(report.quarantined) == 12
    assert all("float16" in entry.reason for entry in report.quarantined)


def test_features_that_are_not_finite_are_quarantined_alone(dino, images, monkeypatch):
    run = type(dino).run

    def fails_for_one(self, prepared, **options):
        if any(one.source_size == (50, 70) for one in prepared):
            raise InputError("the model gave features that are not finite")
        return run(self, prepared, **options)

    monkeypatch.setattr(type(dino), "run", fails_for_one)
    report = extract(dino, [images])
    assert [entry.key for entry in report.quarantined] == ["images/0002.png", "images/0008.png"]
    assert report.rows == 10


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


@pytest.mark.parametrize("streams", [1, 2])
def test_an_interrupted_run_that_goes_on_gives_the_same_store(dino, tmp_path, monkeypatch, streams):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "images", 40)
    Path("images/0013.png").write_bytes(b"")
    small_segments(monkeypatch, segment_images=8, streams=streams, decoders=streams, threads=1)
    extract(dino, ["images"], output="whole")
    for stop in (1, 9, 2):
        done = 0

        def advance(count, stop=stop):
            nonlocal done
            done += count
            if done >= stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            extract(dino, ["images"], output="parts", advance=advance)
    extract(dino, ["images"], output="parts")
    assert 0 < len(table("parts")) == 39
    assert table("parts").equals(table("whole"))
    assert Path("parts/quarantine.jsonl").read_text() == Path("whole/quarantine.jsonl").read_text()


@pytest.mark.parametrize("limits", [{"segment_bytes": 1}, {"segment_bytes": 100_000}, {"segment_flops": 1.0}])
def test_segments_bound_what_is_held(dino, images, monkeypatch, limits):
    small_segments(monkeypatch, **limits)
    held = []
    commit = pipeline.Pipeline._commit

    def watched(self, segment):
        held.append(segment.held_bytes)
        commit(self, segment)

    monkeypatch.setattr(pipeline.Pipeline, "_commit", watched)
    extract(dino, [images])
    assert dd.FeatureStore("features").keys() == [f"images/{n:04d}.png" for n in range(12)]
    assert len(held) > 2
    assert max(held) <= limits.get("segment_bytes", 0) + 100_000  # one image more at most


def test_batch_size_and_limit(dino, images):
    assert extract(dino, [images], limit=5, batch_size=2).rows == 5
    assert dd.FeatureStore("features").keys() == [f"images/{n:04d}.png" for n in range(5)]
    assert extract(dino, [images]).rows == 7


def test_images_over_max_tokens_are_made_smaller_and_counted(dino, images):
    small = dino.with_transform(replace(dino.transform, max_tokens=8))
    report = extract(small, [images])
    assert report.shrunk == 8  # 64×64 and 50×70 and 97×33 of every six
    store = dd.FeatureStore("features")
    assert all(features.grid[0] * features.grid[1] <= 8 for features in store)


def write_video(path, frames, *, size=(64, 48)):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for number in range(frames):
            array = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def test_each_frame_of_a_video_is_a_row(dino, images):
    write_video("clip.mp4", 7)
    report = extract(dino, ["images/0000.png", "clip.mp4", "images/0001.png"], every=3)
    store = dd.FeatureStore("features")
    frames = [f"clip.mp4#frame={n:06d}" for n in (0, 3, 6)]
    assert store.keys() == ["images/0000.png", *frames, "images/0001.png"]
    rows = store.dataset.to_table(columns=["frame", "last_frame"]).to_pylist()
    assert [row["frame"] for row in rows] == [None, 0, 3, 6, None]
    assert [row["last_frame"] for row in rows] == [None, False, False, True, None]
    assert report.rows == 5
    again = extract(dino, ["images/0000.png", "clip.mp4", "images/0001.png"], every=3)
    assert (again.rows, len(again.plan.jobs)) == (0, 0)  # a complete video is not even opened


@pytest.mark.parametrize("files", ["lance", "npz", "safetensors"])
def test_a_video_goes_on_where_it_stopped(dino, images, files, monkeypatch):
    write_video("clip.mp4", 9)
    small_segments(monkeypatch, segment_images=3)
    whole = extract(dino, ["clip.mp4"], output="whole", files=files)
    commits = 0
    commit = pipeline.Pipeline._commit

    def twice(self, segment):
        nonlocal commits
        commits += 1
        if commits == 3:
            raise KeyboardInterrupt
        commit(self, segment)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline.Pipeline, "_commit", twice)
        with pytest.raises(KeyboardInterrupt):
            extract(dino, ["clip.mp4"], output="parts", files=files)
    rest = extract(dino, ["clip.mp4"], output="parts", files=files)
    assert (whole.total, rest.rows, rest.total) == (9, 3, 9)
    if files == "lance":
        assert table("parts").equals(table("whole"))
    assert len(extract(dino, ["clip.mp4"], output="parts", files=files).plan.jobs) == 0


def test_a_damaged_video_gives_the_frames_before_the_damage(dino, images):
    write_video("clip.avi", 30)
    Path("no.mp4").write_bytes(b"\0" * 5000)
    os.truncate("clip.avi", Path("clip.avi").stat().st_size // 2)
    report = extract(dino, ["clip.avi", "no.mp4"])
    assert [entry.key for entry in report.quarantined][-1] == "no.mp4"
    assert 0 < report.rows < 30
    again = extract(dino, ["clip.avi", "no.mp4"])
    assert (again.rows, again.plan.held) == (0, len(report.quarantined))


def test_wrong_arguments(dino, images):
    for options in ({"limit": 0}, {"batch_size": 0}, {"every": 0}):
        with pytest.raises(InputError, match="at least 1"):
            extract(dino, [images], **options)
    with pytest.raises(UnknownNameError, match="safetensors"):
        extract(dino, [images], files="npy")
    with pytest.raises(InputError, match="block indices"):
        extract(dino, [images], layers=[7])
    with pytest.raises(InputError, match="no file or folder"):
        extract(dino, ["imgs"])
    with pytest.raises(StoreError, match="not empty"):
        extract(dino, [images], output="images")
    assert not Path("images/.lock").exists()
    with pytest.raises(StoreError, match="is a file"):
        extract(dino, [images], output="images/0000.png")
    other = dd.load("debug_vit", weights="random")
    other.model.train()
    with pytest.raises(InputError, match="training mode"):
        extract(other, [images])


def test_threads_are_as_before(dino, images):
    before = torch.get_num_threads()
    extract(dino, [images])
    assert torch.get_num_threads() == before


def test_the_disk_failing_is_an_error_that_says_what_to_do(dino, images, monkeypatch):
    import lance

    write = lance.write_dataset

    def full(data, *args, **options):
        if data.num_rows:
            raise OSError("No space left on device")
        return write(data, *args, **options)

    monkeypatch.setattr(lance, "write_dataset", full)
    with pytest.raises(StoreError, match=r"No space left.*run the same command"):
        extract(dino, [images])


def test_the_source_may_vanish_between_listing_and_reading(dino, images, monkeypatch):
    def remove(plan):
        Path("images/0003.png").unlink()

    report = extract(dino, [images], announce=remove)
    assert [entry.key for entry in report.quarantined] == ["images/0003.png"]
    assert "cannot be opened" in report.quarantined[0].reason


def test_settings_do_not_depend_on_what_is_left():
    cpu = torch.device("cpu")
    torch.set_num_threads(4)
    try:
        assert Settings.choose(cpu, inputs=1, batch_size=None).streams == 1
        many = Settings.choose(cpu, inputs=1000, batch_size=None)
        assert (many.streams, many.threads) == (4, 1)
    finally:
        torch.set_num_threads(1)
    assert many.batch_of(196) == 8
    assert many.batch_of(10_000) == 1
    assert Settings.choose(torch.device("cuda"), inputs=1, batch_size=3).batch_of(10) == 3
