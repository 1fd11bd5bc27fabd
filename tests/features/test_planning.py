"""What is left to do, and what it takes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from PIL import Image

import densedino as dd
from densedino.errors import StoreError
from densedino.features import planning
from densedino.features.extract import extract
from densedino.features.planning import Job, Settings, Survey, absolute, survey
from densedino.images.datasets import Item


def test_a_changed_file_is_computed_again_a_touched_one_is_not(tiny, images, tmp_path):
    extract(tiny, [images])
    os.utime("images/0001.png", ns=(1, 1))
    Image.new("RGB", (80, 16), (9, 200, 30)).save("images/0002.png")
    seen = []
    report = extract(tiny, [images], announce=seen.append)
    assert report.rows == 1
    assert seen[0].stale == ("images/0002.png",)
    store = dd.FeatureStore("features")
    assert len(store) == 12
    assert store["images/0002.png"].source_sizes == ((16, 80),)
    assert extract(tiny, [images]).rows == 0


def test_another_file_under_the_same_key_is_refused(tiny, images, tmp_path, monkeypatch, write_images):
    extract(tiny, [images])
    write_images(tmp_path / "elsewhere", 0)
    write_images(tmp_path / "elsewhere" / "images", 3, start=1)
    (tmp_path / "elsewhere" / "images" / "0001.png").rename(tmp_path / "elsewhere" / "images" / "0000.png")
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match=r"another picture.*absolute paths"):
        extract(tiny, ["images"], output=tmp_path / "features")


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
    streaming = Settings.choose(cpu, inputs=1000, batch_size=None, streaming=True)
    assert streaming.streams == 1 and streaming.batch_of(1024) == 8  # weights are read once per batch


def test_the_survey_estimates_from_headers(tiny, images, write_images, monkeypatch):
    jobs = [Job(n, Item(f"{n}", Path(f"images/{n:04d}.png")), None) for n in range(12)]
    every = survey(jobs, tiny)
    grids = [tiny.transform(job.item.path).valid.shape for job in jobs]
    assert every.exact
    assert every.tokens == sum(h * w for h, w in grids)
    assert every.largest_tokens == max(h * w for h, w in grids)
    assert every.largest_pixels == 64 * 64
    Path("images/0000.png").write_bytes(b"no picture")
    assert survey(jobs, tiny).tokens == sum(h * w for h, w in grids[1:])
    monkeypatch.setattr(planning, "_SAMPLE", 4)
    some = survey([*jobs, Job(12, Item("a.mp4", Path("a.mp4")), None)], tiny)
    assert not some.exact
    assert some.images == 12
    assert 0.5 < some.tokens / every.tokens < 2


@pytest.mark.parametrize("name", ["debug_vit", "debug_convnext"])
def test_the_memory_named_grows_with_the_job_and_is_bounded(name):
    dino = dd.load(name, weights="random")
    settings = Settings.choose(torch.device("cpu"), inputs=100, batch_size=None)

    def bound(images, tokens=196):
        seen = Survey(
            images=images, tokens=images * tokens, largest_tokens=tokens, largest_pixels=tokens * 256, exact=True
        )
        return settings.memory_bytes(dino, seen, layers=0)

    assert bound(1) < bound(100) < bound(1000)
    assert bound(10_000) == bound(1_000_000)
    assert bound(1_000_000) < 2**31
    assert bound(10, 16384) > bound(10, 196)


def test_names_that_are_no_text_can_be_stored():
    assert absolute(Path("/a/b\udcff.png")) == "/a/b\\xff.png"
