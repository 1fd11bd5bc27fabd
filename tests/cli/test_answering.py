from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from densedino.cli.main import main

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def _run(verb: str, kind: str, inputs: Path, out: Path, *more: str) -> int:
    return main([verb, str(inputs), "--model", f"debug_vit-{kind}", "--weights", "random", "-o", str(out), *more])


def test_a_run_goes_on_and_lists_what_cannot_be_used(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(photos, tmp_path / "photos")
    (folder / "broken.jpg").write_bytes(b"no picture")
    assert _run("classify", "lc", folder, tmp_path / "out") == 0
    said = capsys.readouterr()
    assert "answers for 4 images, 1 not usable" in said.out and "broken.jpg" in said.err and "UNTRAINED" in said.err
    records = sorted((tmp_path / "out").rglob("*.jpg.json"))
    before = [record.stat().st_mtime_ns for record in records]
    table = (tmp_path / "out" / "classes.csv").read_text()
    records[0].unlink()
    assert _run("classify", "lc", folder, tmp_path / "out") == 0
    assert [record.stat().st_mtime_ns for record in records][1:] == before[1:]
    assert (tmp_path / "out" / "classes.csv").read_text() == table and table.count("\n") == 4 * 5 + 1


def test_what_cannot_be_is_said(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run("classify", "dpt", photos, tmp_path / "out") == 2
    assert "unknown head for classify 'debug_vit-dpt'" in capsys.readouterr().err
    assert main(["classify", str(photos), "-o", str(tmp_path / "out")]) == 2
    assert "dinov3_vit7b16_imagenet1k_linear_head-90d8ed92.pth" in capsys.readouterr().err
    assert main(["depth", "--model", "debug_vit-dpt", "--weights", "random"]) == 2
    assert "no inputs" in capsys.readouterr().err


def test_frames_of_a_video_are_answered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import av
    import numpy as np

    with av.open(str(tmp_path / "clip.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(4):
            image = np.full((48, 64, 3), 60 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    assert _run("classify", "lc", tmp_path / "clip.mp4", tmp_path / "out", "--every", "2", "--top", "1") == 0
    rows = (tmp_path / "out" / "classes.csv").read_text().splitlines()[1:]
    assert [row.split(",")[0][-12:] for row in rows] == ["frame=000000", "frame=000002"]
