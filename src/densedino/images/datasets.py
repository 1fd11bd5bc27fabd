"""Owns which pictures a command is about: files, folders, patterns, text lists and videos, in one fixed order."""

from __future__ import annotations

import difflib
import glob
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

from densedino.errors import ImageError, InputError, require
from densedino.images.containers import IMAGE_SUFFIXES, open_regular

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy as np
    from numpy.typing import NDArray

__all__ = ["VIDEO_SUFFIXES", "Item", "Listing", "list_inputs", "sha256_file", "video_frames"]

VIDEO_SUFFIXES = frozenset({".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm"})
"""A GIF counts as a picture (its first frame)."""


@dataclass(frozen=True)
class Item:
    """One picture, or one video, or one frame of a video."""

    key: str
    """Its name in a store: the path as given, with forward slashes; `clip.mp4#frame=000123` for a frame."""
    path: Path
    frame: int | None = None
    """Number of the frame, from 0 in the order of decoding. None for a picture, and for a video as a whole."""

    @property
    def is_video(self) -> bool:
        """Whether this is a video as a whole, to be opened with `video_frames`."""
        return self.frame is None and self.path.suffix.lower() in VIDEO_SUFFIXES


@dataclass(frozen=True)
class Listing:
    """What inputs amount to: a sequence of items, each file once."""

    items: tuple[Item, ...]
    ignored: int
    """Files in folders and patterns that are neither pictures nor videos by their name, or hidden."""

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Item]:
        return iter(self.items)

    def __getitem__(self, index: int) -> Item:
        return self.items[index]


def list_inputs(inputs: Sequence[str | os.PathLike[str]]) -> Listing:
    """Find the pictures and videos that `inputs` name.

    Each input is one of
    - a file: taken whatever its name (the content decides when it is read);
    - a folder: all below it with the name of a picture or video, sorted; links to folders are followed once;
    - a pattern such as `photos/**/*.jpg` (if no file has that very name): like a folder with these files;
    - a text list `*.txt`: UTF-8, a path in each line, relative to the folder of the list; empty lines and lines that
      start with # are skipped. A path that does not exist is kept, to be reported when it is read.

    Order: that of the inputs, sorted by path within each. A file that is reached twice is listed at the first place.

    Raises:
        InputError: an input does not exist, no pattern matches, a list names no file that exists, or nothing is found.
    """
    found: list[Path] = []
    ignored = 0
    for given in inputs:
        paths, others = _expand(os.fspath(given))
        found += paths
        ignored += others
    folders: dict[Path, str] = {}
    unique: dict[str, Path] = {}
    for path in found:
        unique.setdefault(_identity(path, folders), path)
    items: dict[str, Item] = {}
    for path in unique.values():
        key = _key(path)
        if key in items:
            raise InputError(f"{items[key].path!r} and {path!r} would both be called {key!r}. Rename one.")
        items[key] = Item(key, path)
    if not items:
        names = ", ".join(repr(os.fspath(given)) for given in inputs) or "nothing"
        raise InputError(
            f"no pictures or videos in {names} ({ignored} other files). They are told by their names: "
            f"{' '.join(sorted(IMAGE_SUFFIXES | VIDEO_SUFFIXES))}."
        )
    return Listing(tuple(items.values()), ignored)


def _identity(path: Path, folders: dict[Path, str]) -> str:
    """Resolve links; each folder once, as there may be millions of files."""
    if path.is_symlink():
        return os.path.realpath(path)
    if path.parent not in folders:
        folders[path.parent] = os.path.realpath(path.parent)
    return os.path.join(folders[path.parent], path.name)  # noqa: PTH118 (a string, not a Path, per file)


def _key(path: Path) -> str:
    # A name that is no UTF-8 (possible on Linux) could not be stored as text.
    return path.as_posix().encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _expand(given: str) -> tuple[list[Path], int]:
    """Paths of one input, and how many files in it were passed over."""
    path = Path(given)
    if path.is_dir():
        return _walk(path)
    if os.path.lexists(path):  # a broken link too: it is reported when it is read
        return (_read_list(path), 0) if path.suffix.lower() == ".txt" else ([path], 0)
    if glob.has_magic(given):
        return _match(given)
    if "://" in given:
        raise InputError(f"{given!r} is a URL. Download it first, and give the file or folder.")
    siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, siblings, n=3, cutoff=0.6)
    hint = f" Near: {', '.join(repr(str(path.parent / name)) for name in near)}." if near else ""
    if not path.parent.is_dir():
        hint = f" Nor is there a folder {str(path.parent)!r}."
    raise InputError(f"no file or folder {given!r} (seen from {str(Path.cwd())!r}).{hint}")


def _walk(folder: Path) -> tuple[list[Path], int]:
    paths: list[Path] = []
    ignored = 0
    seen: set[tuple[int, int]] = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        status = Path(root).stat()
        if (status.st_dev, status.st_ino) in seen:  # a link back up
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        wanted = [name for name in files if _is_wanted(name)]
        ignored += len(files) - len(wanted)
        paths += [Path(root, name) for name in wanted]
    return sorted(paths), ignored


def _match(pattern: str) -> tuple[list[Path], int]:
    matches = sorted(Path(match) for match in glob.glob(pattern, recursive=True))  # noqa: PTH207 (Path.glob takes no absolute pattern)
    if not matches:
        raise InputError(
            f"nothing matches {pattern!r} (seen from {str(Path.cwd())!r}). Quote it, and use ** for all folders below."
        )
    paths: list[Path] = []
    ignored = 0
    for match in matches:
        if match.is_dir():
            below, others = _walk(match)
            paths += below
            ignored += others
        elif _is_wanted(match.name):
            paths.append(match)
        else:
            ignored += 1
    return paths, ignored


def _is_wanted(name: str) -> bool:
    suffix = PurePath(name).suffix.lower()
    return not name.startswith(".") and (suffix in IMAGE_SUFFIXES or suffix in VIDEO_SUFFIXES)


def _read_list(path: Path) -> list[Path]:
    with open_regular(path) as file:
        text = file.read()
    if b"\0" in text:
        raise InputError(f"{str(path)!r} is not a text list: it holds binary data.")
    lines = (line.strip() for line in text.decode("utf-8-sig", "surrogateescape").split("\n"))
    paths = [path.parent / line for line in lines if line and not line.startswith("#")]
    if paths and not any(os.path.lexists(entry) for entry in paths):
        raise InputError(
            f"none of the {len(paths)} paths in {str(path)!r} exists; the first is {str(paths[0])!r}. "
            "A list has one path per line, relative to its own folder."
        )
    return paths


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Hex SHA-256 of a file's content, read in pieces.

    Raises:
        ImageError: it cannot be opened, or is no regular file.
    """
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Formats whose reading touches no other file and no network (unlike playlists, which FFmpeg would follow).
_VIDEO_OPTIONS = {"format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,avi,matroska,webm", "protocol_whitelist": "file"}


def video_frames(
    item: Item, *, every: int = 1, max_pixels: int = 178_956_970
) -> Iterator[tuple[Item, NDArray[np.uint8]]]:
    """Decode a video from its beginning, and yield every `every`-th frame: its item and [H,W,3] uint8, upright.

    Raises:
        MissingExtraError: PyAV is not installed.
        InputError: `every` is below 1.
        ImageError: no video, or damaged; the frames before the damage were yielded. Or frames of over `max_pixels`.
    """
    if every < 1:
        raise InputError(f"every is {every}; 1 takes all frames, 10 every tenth.")
    av = require("av", extra="video", purpose="reading a video")
    import numpy as np

    name = repr(os.fspath(item.path))
    with open_regular(item.path) as file:
        try:
            with av.open(file, options=_VIDEO_OPTIONS) as container:
                if not container.streams.video:
                    raise ImageError(f"{name} has no video stream.")
                stream = container.streams.video[0]
                if stream.codec_context.width * stream.codec_context.height > max_pixels:
                    raise ImageError(f"{name} has frames of more than max_pixels={max_pixels:,}.")
                stream.thread_type = "AUTO"
                for number, frame in enumerate(container.decode(stream)):
                    if number % every == 0:
                        array = frame.to_ndarray(format="rgb24")
                        turned = np.rot90(array, frame.rotation // 90) if frame.rotation else array
                        yield Item(f"{item.key}#frame={number:06d}", item.path, number), np.ascontiguousarray(turned)
        except av.error.FFmpegError as error:
            raise ImageError(f"{name} is no video, or a damaged one ({error.strerror}). Fetch it again.") from error
