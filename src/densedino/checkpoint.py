"""Owns writing files so that a reader sees the whole new file or the old one, never half of it."""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["atomic_path"]


@contextmanager
def atomic_path(path: str | os.PathLike[str], *, directory: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success fsync it and rename it to `path`, on error remove it.

    Args:
        path: where the file (or folder) is to stand. Missing parent folders are made.
        directory: the result is a folder; the yielded path is an empty folder to fill. An existing non-empty
            `path` is refused by the rename (OSError), never merged into.
    """
    final = Path(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=".tmp", dir=final.parent))
    work = scratch if directory else scratch / final.name
    try:
        yield work
        for item in work.rglob("*") if directory else [work]:
            if item.is_file():
                _fsync(item)
        if directory:
            scratch.chmod(0o755)
        os.replace(work, final)  # noqa: PTH105 (Path.replace does the same; os.replace is the documented atomic call)
        _fsync(final.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _fsync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows cannot open a folder for this, and needs no such call
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
