"""Taking pictures in: each read once, frames of videos, and what is wrong with the rest."""

from __future__ import annotations

import os
from pathlib import Path

import av
import numpy as np
import pytest

import densedino as dd
from densedino.features import pipeline
from densedino.features.extract import extract


def table(path):
    return dd.FeatureStore(path).dataset.to_table()


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


def test_each_frame_of_a_video_is_a_row(tiny, images):
    write_video("clip.mp4", 7)
    report = extract(tiny, ["images/0000.png", "clip.mp4", "images/0001.png"], every=3)
    store = dd.FeatureStore("features")
    frames = [f"clip.mp4#frame={n:06d}" for n in (0, 3, 6)]
    assert store.keys() == ["images/0000.png", *frames, "images/0001.png"]
    rows = store.dataset.to_table(columns=["frame", "last_frame"]).to_pylist()
    assert [row["frame"] for row in rows] == [None, 0, 3, 6, None]
    assert [row["last_frame"] for row in rows] == [None, False, False, True, None]
    assert report.rows == 5
    again = extract(tiny, ["images/0000.png", "clip.mp4", "images/0001.png"], every=3)
    assert (again.rows, len(again.plan.jobs)) == (0, 0)  # a complete video is not even opened


@pytest.mark.parametrize("files", ["lance", "npz", "safetensors"])
def test_a_video_goes_on_where_it_stopped(tiny, images, files, monkeypatch, small_segments):
    write_video("clip.mp4", 9)
    small_segments(segment_images=3)
    whole = extract(tiny, ["clip.mp4"], output="whole", files=files)
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
            extract(tiny, ["clip.mp4"], output="parts", files=files)
    rest = extract(tiny, ["clip.mp4"], output="parts", files=files)
    assert (whole.total, rest.rows, rest.total) == (9, 3, 9)
    if files == "lance":
        assert table("parts").equals(table("whole"))
    assert len(extract(tiny, ["clip.mp4"], output="parts", files=files).plan.jobs) == 0


def test_a_damaged_video_gives_the_frames_before_the_damage(tiny, images):
    write_video("clip.avi", 30)
    Path("no.mp4").write_bytes(b"\0" * 5000)
    os.truncate("clip.avi", Path("clip.avi").stat().st_size // 2)
    report = extract(tiny, ["clip.avi", "no.mp4"])
    assert [entry.key for entry in report.quarantined][-1] == "no.mp4"
    assert 0 < report.rows < 30
    again = extract(tiny, ["clip.avi", "no.mp4"])
    assert (again.rows, again.plan.held) == (0, len(report.quarantined))


def test_the_source_may_vanish_between_listing_and_reading(tiny, images, monkeypatch):
    def remove(plan):
        Path("images/0003.png").unlink()

    report = extract(tiny, [images], announce=remove)
    assert [entry.key for entry in report.quarantined] == ["images/0003.png"]
    assert "cannot be opened" in report.quarantined[0].reason
