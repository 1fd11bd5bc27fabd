from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from PIL import Image

from densedino.errors import InputError
from densedino.tasks.folder import Answer, AnswerFolder

if TYPE_CHECKING:
    from pathlib import Path


def test_an_answer_stands_until_its_picture_changes(tmp_path: Path) -> None:
    photo = tmp_path / "a.jpg"
    photo.write_bytes(b"x")
    folder = AnswerFolder(tmp_path / "out", {"head": "h", "layers": (1, 2)})
    assert folder.standing("d/a.jpg", photo) is None
    record = folder.write("d/a.jpg", photo, Answer({"n": 1}, {"sheet": Image.new("L", (2, 2))}))
    assert record["files"] == {"sheet": "d/a.jpg.sheet.png"} and (tmp_path / "out/d/a.jpg.sheet.png").exists()
    again = AnswerFolder(tmp_path / "out", {"head": "h", "layers": (1, 2)})
    assert again.standing("d/a.jpg", photo) == json.loads(json.dumps(record))
    photo.write_bytes(b"xy")
    assert again.standing("d/a.jpg", photo) is None
    (tmp_path / "out/d/a.jpg.json").write_text('{"im')
    assert again.standing("d/a.jpg", photo) is None


def test_other_answers_and_other_folders_are_refused(tmp_path: Path) -> None:
    AnswerFolder(tmp_path / "out", {"head": "h"})
    with pytest.raises(InputError, match="holds answers with head 'h', not 'g'"):
        AnswerFolder(tmp_path / "out", {"head": "g"})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("dear to me")
    with pytest.raises(InputError, match="holds no answers of densedino"):
        AnswerFolder(tmp_path / "mine", {"head": "h"})


def test_no_key_leaves_the_folder(tmp_path: Path) -> None:
    folder = AnswerFolder(tmp_path / "out", {})
    for key in ("../../a.jpg", "/etc/a.jpg", "C:\\a.jpg", "clip.mp4#frame=000001"):
        assert folder.file(key, "json").resolve().is_relative_to((tmp_path / "out").resolve())
