"""Owns the folder that answers are kept in: one record per picture, written last, so that a run can go on."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from densedino.checkpoint import atomic_path
from densedino.errors import InputError
from densedino.features.sheet import save_png

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from PIL import Image

__all__ = ["Answer", "AnswerFolder"]

_ABOUT = "answers.json"


@dataclass(frozen=True)
class Answer:
    """What a model said of one picture."""

    record: Mapping[str, Any]
    """For JSON."""
    images: Mapping[str, Image.Image] = field(default_factory=dict)
    """By the ending of the file: "depth" becomes photo.jpg.depth.png."""


class AnswerFolder:
    """Answers of one model with one set of options."""

    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        """Make the folder, or go on in one that was made with the same model and options.

        Raises:
            InputError: it holds something else.
        """
        self.path = path
        self.about = json.loads(json.dumps(dict(about)))
        described = path / _ABOUT
        if described.is_file():
            found = json.loads(described.read_text())
            if differing := sorted(k for k in {*found, *self.about} if found.get(k) != self.about.get(k)):
                one = differing[0]
                raise InputError(
                    f"{path} holds answers with {one} {found.get(one)!r}, not {self.about.get(one)!r}. Give another "
                    "folder with -o, or remove this one."
                )
            return
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise InputError(f"{path} exists and holds no answers of densedino. Give another folder with -o.")
        with atomic_path(described) as work:
            work.write_text(json.dumps(self.about, indent=1))

    def file(self, key: str, ending: str) -> Path:
        """Where a file of a picture stands: below the folder, whatever its key."""
        parts = [part.replace(":", "").replace("\\", "_") for part in key.split("/") if part not in ("", ".")]
        *folders, name = ["__" if part == ".." else part for part in parts]
        return self.path.joinpath(*folders, f"{name}.{ending}")

    def standing(self, key: str, source: Path) -> dict[str, Any] | None:
        """The record of a picture that has been answered and has not changed since."""
        try:
            record = json.loads(self.file(key, "json").read_text())
        except (FileNotFoundError, ValueError):
            return None
        return record if record.get("stamp") == _stamp(source) else None

    def write(self, key: str, source: Path, answer: Answer) -> dict[str, Any]:
        """Write the images, then the record, which says that all is there; return the record."""
        names = {}
        for ending, image in answer.images.items():
            path = self.file(key, f"{ending}.png")
            save_png(image, path, facts={"Software": "densedino", "densedino.answers": json.dumps(self.about)})
            names[ending] = path.relative_to(self.path).as_posix()
        record = {"image": key, "stamp": _stamp(source), **answer.record, "files": names}
        with atomic_path(self.file(key, "json")) as work:
            work.write_text(json.dumps(record))
        return record


def _stamp(source: Path) -> list[int]:
    status = os.stat(source)  # noqa: PTH116 (a stamp of the file that a link points to)
    return [status.st_size, status.st_mtime_ns]
