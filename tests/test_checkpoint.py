from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from densedino.checkpoint import atomic_path

if TYPE_CHECKING:
    from pathlib import Path


def test_the_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "new" / "a.bin"
    with atomic_path(target) as work:
        work.write_bytes(b"half")
        assert not target.exists()
        work.write_bytes(b"whole")
    assert target.read_bytes() == b"whole"
    assert [p.name for p in target.parent.iterdir()] == ["a.bin"]


def test_an_error_leaves_the_old_file_and_no_rubbish(tmp_path: Path) -> None:
    target = tmp_path / "a.bin"
    target.write_bytes(b"old")
    with pytest.raises(RuntimeError, match="boom"), atomic_path(target) as work:
        work.write_bytes(b"new")
        raise RuntimeError("boom")
    assert target.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_a_folder_lands_as_a_whole(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with atomic_path(target, directory=True) as work:
        (work / "config.json").write_text("{}")
        (work / "deep").mkdir()
        (work / "deep" / "weights").write_bytes(b"w")
    assert sorted(p.name for p in target.iterdir()) == ["config.json", "deep"]
    with pytest.raises(OSError, match="not empty"), atomic_path(target, directory=True) as work:
        (work / "config.json").write_text("other")
    assert (target / "config.json").read_text() == "{}"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
