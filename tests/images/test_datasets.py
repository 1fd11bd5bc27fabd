"""Listing of files, folders, patterns, lists and videos: order, identity, odd names, and what is missing."""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
from pathlib import Path

import av
import numpy as np
import pytest

from densedino.errors import ImageError, InputError
from densedino.images.datasets import Item, list_inputs, sha256_file, video_frames


@pytest.fixture
def tree(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [
        "b/2.jpg",
        "b/10.JPG",
        "a.png",
        "b/c/x.tif",
        "b/notes.txt",
        "b/.hidden.jpg",
        ".git/y.jpg",
        "z.gif",
        "clip.mp4",
    ]
    for name in names:
        path = Path("photos", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return tmp_path


def keys(*inputs):
    return [item.key for item in list_inputs(inputs)]


def test_folder_is_sorted_and_counts_what_it_leaves_out(tree):
    listing = list_inputs(["photos"])
    expected = [
        "photos/a.png",
        "photos/b/10.JPG",
        "photos/b/2.jpg",
        "photos/b/c/x.tif",
        "photos/clip.mp4",
        "photos/z.gif",
    ]
    assert [item.key for item in listing] == expected
    assert listing.ignored == 2
    assert len(listing) == 6
    assert [item.is_video for item in listing] == [False] * 4 + [True, False]
    assert keys("./photos/") == expected
    assert listing[0] == Item("photos/a.png", Path("photos/a.png"))


def test_inputs_keep_their_order_and_files_come_once(tree):
    assert keys("photos/z.gif", "photos/b", "photos/b/2.jpg", tree / "photos" / "a.png", "photos/a.png") == [
        "photos/z.gif",
        "photos/b/10.JPG",
        "photos/b/2.jpg",
        "photos/b/c/x.tif",
        (tree / "photos/a.png").as_posix(),
    ]


def test_a_file_is_taken_whatever_its_name(tree):
    Path("download").write_bytes(b"")
    Path(".hidden.png").write_bytes(b"")
    assert keys("download", ".hidden.png") == ["download", ".hidden.png"]


def test_patterns(tree):
    assert keys("photos/*.png") == ["photos/a.png"]
    assert keys("photos/**/*.[jJ]*") == ["photos/b/10.JPG", "photos/b/2.jpg"]
    assert list_inputs(["photos/b/*"]).ignored == 1
    assert keys("photos/b*") == ["photos/b/10.JPG", "photos/b/2.jpg", "photos/b/c/x.tif"]
    with pytest.raises(InputError, match="nothing matches"):
        list_inputs(["photos/*.bmp"])


def test_a_name_that_looks_like_a_pattern_is_the_file(tree):
    Path("photos/img[1].jpg").write_bytes(b"")
    assert keys("photos/img[1].jpg") == ["photos/img[1].jpg"]


@pytest.mark.parametrize(
    "name",
    ["with space.jpg", "ümläut 漢字.jpg", "new\nline.jpg", "a#b=c:d.jpg", "-dash.jpg", "'quote\".jpg", "100%.jpg"],
)
def test_odd_names(tree, name):
    Path("odd").mkdir()
    Path("odd", name).write_bytes(b"")
    assert keys("odd") == keys(f"odd/{name}") == [f"odd/{name}"]


def test_a_name_that_is_no_utf8_has_a_key_that_can_be_stored(tree):
    Path("odd").mkdir()
    raw = os.fsdecode(b"odd/\xff\xfe.jpg")
    Path(raw).write_bytes(b"x")
    (item,) = list_inputs(["odd"])
    assert item.key == r"odd/\xff\xfe.jpg"
    assert item.key.encode()
    assert item.path.read_bytes() == b"x"
    Path("odd", r"\xff\xfe.jpg").write_bytes(b"")
    with pytest.raises(InputError, match="both be called"):
        list_inputs(["odd"])


def test_text_list(tree):
    lines = ["\ufeff# comment\r", "../photos/a.png\r", "\r", "  ../photos/with space.jpg  ", "../photos/missing.jpg"]
    text = "\n".join([*lines, "../photos/a#1.png", ""])
    Path("lists").mkdir()
    Path("lists/train.txt").write_bytes(text.encode())
    names = ["a.png", "with space.jpg", "missing.jpg", "a#1.png"]
    assert keys("lists/train.txt") == [f"lists/../photos/{name}" for name in names]


def test_text_list_of_nothing(tree):
    Path("wrong.txt").write_text("nowhere/a.jpg\nnowhere/b.jpg\n")
    with pytest.raises(InputError, match="none of the 2 paths"):
        list_inputs(["wrong.txt"])
    Path("empty.txt").write_text("# nothing\n")
    with pytest.raises(InputError, match=r"no pictures or videos in 'empty\.txt'"):
        list_inputs(["empty.txt"])
    Path("binary.txt").write_bytes(b"\x89PNG\0\0")
    with pytest.raises(InputError, match="binary"):
        list_inputs(["binary.txt"])


def test_missing_inputs(tree):
    with pytest.raises(InputError, match=r"no file or folder 'photo'.*Near: 'photos'"):
        list_inputs(["photo"])
    with pytest.raises(InputError, match=r"Nor is there a folder 'nowhere'"):
        list_inputs(["nowhere/a.jpg"])
    with pytest.raises(InputError, match="is a URL"):
        list_inputs(["https://example.org/a.jpg"])
    with pytest.raises(InputError, match="no pictures or videos in nothing"):
        list_inputs([])
    Path("none").mkdir()
    Path("none/readme.md").write_text("")
    with pytest.raises(InputError, match=r"no pictures or videos in 'none' \(1 other files\).*\.jpg"):
        list_inputs(["none"])


def test_links(tree):
    outside = tree / "outside"
    outside.mkdir()
    (outside / "o.jpg").write_bytes(b"")
    Path("photos/linked").symlink_to(outside)
    Path("photos/b/up").symlink_to("..")  # a loop
    Path("photos/broken.jpg").symlink_to("nowhere.jpg")
    Path("photos/self.jpg").symlink_to("self.jpg")
    Path("photos/same.png").symlink_to("a.png")
    found = keys("photos")
    assert "photos/linked/o.jpg" in found
    assert {"photos/broken.jpg", "photos/self.jpg"} <= set(found)  # reported when they are read
    assert "photos/same.png" not in found  # a.png, a second time
    assert len(found) == len(set(found)) == 9


def test_sha256(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"abc" * 100_000)
    assert sha256_file(path) == hashlib.sha256(b"abc" * 100_000).hexdigest()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ImageError, match="no regular file"):
        sha256_file(tmp_path / "pipe")


def write_video(path: Path, frames: list[np.ndarray]) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


GREYS = [np.full((48, 64, 3), 30 * number, np.uint8) for number in range(7)]


@pytest.mark.parametrize("suffix", [".mp4", ".avi", ".mkv", ".mov"])
def test_video_frames(tmp_path, suffix):
    path = write_video(tmp_path / f"clip{suffix}", GREYS)
    (item,) = list_inputs([path])
    assert item.is_video
    frames = list(video_frames(item, every=3))
    assert [frame.key for frame, _ in frames] == [f"{path.as_posix()}#frame={n:06d}" for n in (0, 3, 6)]
    assert [frame.frame for frame, _ in frames] == [0, 3, 6]
    for number, (frame, array) in zip((0, 3, 6), frames, strict=True):
        assert not frame.is_video
        assert array.shape == (48, 64, 3)
        assert abs(array.mean() - 30 * number) < 3
    assert len(list(video_frames(item))) == 7


def test_video_that_was_turned_by_the_phone(tmp_path):
    left_bright = np.zeros((48, 64, 3), np.uint8)
    left_bright[:, :20] = 200
    path = write_video(tmp_path / "clip.mp4", [left_bright] * 3)
    body = path.read_bytes()
    upright = struct.pack(">9i", 0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000)
    clockwise = struct.pack(">9i", 0, 0x10000, 0, -0x10000, 0, 0, 0, 0, 0x40000000)  # right goes down, so left goes up
    place = body.index(upright, body.index(b"tkhd"))
    path.write_bytes(body[:place] + clockwise + body[place + 36 :])
    (_, array), *_ = video_frames(Item("clip.mp4", path))
    assert array.shape == (64, 48, 3)
    assert array[:16].mean() > 150
    assert array[-30:].mean() < 50


@pytest.mark.parametrize(
    "content",
    [b"", b"no video", bytes(4000), b"#EXTM3U\n#EXTINF:5,\n/etc/passwd\n", b"ffconcat version 1.0\nfile /etc/passwd\n"],
)
def test_what_is_no_video(tmp_path, content):
    path = tmp_path / "clip.mp4"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=r"clip\.mp4' is no video"):
        list(video_frames(Item("clip.mp4", path)))


def test_truncated_video_gives_its_good_frames_or_none(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (12, 48, 64, 3), np.uint8)
    path = write_video(tmp_path / "clip.avi", list(noise))
    body = path.read_bytes()
    path.write_bytes(body[: len(body) * 2 // 3])
    frames = []
    with contextlib.suppress(ImageError):
        for frame in video_frames(Item("clip.avi", path)):
            frames.append(frame)
    assert 0 < len(frames) < 12


def test_video_options(tmp_path):
    path = write_video(tmp_path / "clip.mp4", GREYS)
    with pytest.raises(InputError, match="every is 0"):
        list(video_frames(Item("clip.mp4", path), every=0))
    with pytest.raises(ImageError, match="max_pixels=100"):
        list(video_frames(Item("clip.mp4", path), max_pixels=100))
