"""The moving parts: the same store whatever interrupts, bounded memory, one bad picture at a time."""

from __future__ import annotations

from pathlib import Path

import lance
import pytest
import torch

import densedino as dd
from densedino.errors import InputError, StoreError
from densedino.features import pipeline
from densedino.features.extract import extract


def table(path):
    return dd.FeatureStore(path).dataset.to_table()


def test_what_float16_cannot_hold_is_quarantined(images):
    dino = dd.load("debug_vit", weights="random")
    with torch.no_grad():
        dino.model.norm.weight.fill_(1e6)
    report = extract(dino, [images])
    assert report.total == 0
    assert len(report.quarantined) == 12
    assert all("float16" in entry.reason for entry in report.quarantined)


def test_features_that_are_not_finite_are_quarantined_alone(tiny, images, monkeypatch):
    run = type(tiny).run

    def fails_for_one(self, prepared, **options):
        if any(one.source_size == (50, 70) for one in prepared):
            raise InputError("the model gave features that are not finite")
        return run(self, prepared, **options)

    monkeypatch.setattr(type(tiny), "run", fails_for_one)
    report = extract(tiny, [images])
    assert [entry.key for entry in report.quarantined] == ["images/0002.png", "images/0008.png"]
    assert report.rows == 10


@pytest.mark.parametrize("streams", [1, 2])
def test_an_interrupted_run_that_goes_on_gives_the_same_store(
    tiny, tmp_path, monkeypatch, streams, small_segments, write_images
):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "images", 40)
    Path("images/0013.png").write_bytes(b"")
    small_segments(segment_images=8, streams=streams, decoders=streams, threads=1)
    extract(tiny, ["images"], output="whole")
    for stop in (1, 9, 2):
        done = 0

        def advance(count, stop=stop):
            nonlocal done
            done += count
            if done >= stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            extract(tiny, ["images"], output="parts", advance=advance)
    extract(tiny, ["images"], output="parts")
    assert 0 < len(table("parts")) == 39
    assert table("parts").equals(table("whole"))
    assert Path("parts/quarantine.jsonl").read_text() == Path("whole/quarantine.jsonl").read_text()


@pytest.mark.parametrize("limits", [{"segment_bytes": 1}, {"segment_bytes": 100_000}, {"segment_flops": 1.0}])
def test_segments_bound_what_is_held(tiny, images, monkeypatch, limits, small_segments):
    small_segments(**limits)
    held = []
    commit = pipeline.Pipeline._commit

    def watched(self, segment):
        held.append(segment.held_bytes)
        commit(self, segment)

    monkeypatch.setattr(pipeline.Pipeline, "_commit", watched)
    extract(tiny, [images])
    assert dd.FeatureStore("features").keys() == [f"images/{n:04d}.png" for n in range(12)]
    assert len(held) > 2
    assert max(held) <= limits.get("segment_bytes", 0) + 100_000  # one image more at most


def test_threads_are_as_before(tiny, images):
    before = torch.get_num_threads()
    extract(tiny, [images])
    assert torch.get_num_threads() == before


def test_the_disk_failing_is_an_error_that_says_what_to_do(tiny, images, monkeypatch):
    write = lance.write_dataset

    def full(data, *args, **options):
        if data.num_rows:
            raise OSError("No space left on device")
        return write(data, *args, **options)

    monkeypatch.setattr(lance, "write_dataset", full)
    with pytest.raises(StoreError, match=r"No space left.*run the same command"):
        extract(tiny, [images])
