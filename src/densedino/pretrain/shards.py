"""Owns pictures in tar shards with WebDataset's names: an index of where each lies, and reading it without extraction.

A name in an archive is never used as a path: it is a label, whatever it says.
"""

from __future__ import annotations

import glob
import hashlib
import io
import os
import re
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from densedino.checkpoint import atomic_path
from densedino.errors import ImageError, InputError
from densedino.images.containers import BYTES_PER_PIXEL, IMAGE_SUFFIXES, open_regular
from densedino.images.decoding import MAX_PIXELS
from densedino.pretrain.packed import PackedText
from densedino.weights.sources import cache_dir

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

__all__ = ["NamedBytes", "Shards", "expand_braces", "find_shards", "index_shard"]

INDEX_VERSION = 1
"""Counted up when what an index holds changes."""

MAX_EXPANSIONS = 1_000_000


@dataclass(frozen=True, kw_only=True, eq=False)
class ShardIndex:
    """The pictures in a shard."""

    names: PackedText
    places: NDArray[np.int64]
    """[n, 2]: the byte at which each picture begins, and how many it has."""
    others: PackedText
    """Extensions of the files that are no pictures."""


class NamedBytes(io.BytesIO):
    """The bytes of a picture, and its name for messages."""

    def __init__(self, data: bytes, name: str) -> None:
        super().__init__(data)
        self.name = name


class Shards:
    """The pictures in tar archives: members whose name has the extension of a picture and no other.

    In WebDataset's naming a sample's files share all that stands before the first dot: of `0001.jpg`, `0001.json`,
    `0001.seg.png` the first is the picture. Hidden files, links, sparse files and folders are passed over.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        indices = [_cached_index(path) for path in paths]
        self._paths = [path.absolute() for path in paths]
        """Read from by workers, whose working folder may be another."""
        self._labels = [str(path) for path in paths]
        self._names = PackedText.concatenated([index.names for index in indices])
        self._places = torch.from_numpy(np.concatenate([index.places for index in indices]))
        counts = [len(index.names) for index in indices]
        self._shard = torch.from_numpy(np.repeat(np.arange(len(paths), dtype=np.int32), counts))
        if not len(self._names):
            found = sorted({extension for index in indices for extension in index.others})
            raise InputError(
                f"no pictures in {len(paths)} tar shards from {self._labels[0]!r} on. Their files have the extensions "
                f"{found[:20]}; a picture's is all that follows the first dot: {' '.join(sorted(IMAGE_SUFFIXES))}."
            )

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        """`shard.tar#name in it`."""
        name = self._names[index].encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        return f"{self._labels[int(self._shard[index])]}#{name}"

    def get(self, index: int) -> NamedBytes:
        """The bytes of one picture.

        Raises:
            ImageError: the shard is gone or shorter than it was, or the picture is too large for one.
        """
        offset, size = self._places[index].tolist()
        name = self.name(index)
        if size > BYTES_PER_PIXEL * MAX_PIXELS:
            raise ImageError(f"{name!r} has {size:,} bytes, more than a picture can have.")
        with open_regular(self._paths[int(self._shard[index])]) as file:
            file.seek(offset)
            data = file.read(size)
        if len(data) < size:
            raise ImageError(f"{name!r} is incomplete: the shard has become shorter. Fetch the shard again.")
        return NamedBytes(data, name)


def find_shards(pattern: str) -> list[Path] | None:
    """The archives that `pattern` names, in order: a path, braces as in `train-{000..146}.tar`, or a glob pattern.

    Returns:
        None if it does not name tar archives.

    Raises:
        InputError: an archive that is not there, or is compressed.
    """
    expanded = [pattern] if os.path.lexists(pattern) else list(expand_braces(pattern))
    if packed := next((name for name in expanded if re.search(r"\.(tgz|tar\.\w+)$", name)), None):
        raise InputError(
            f"{packed!r} is a compressed archive, in which no picture can be found without reading all before it. "
            "Uncompress it: pictures are compressed already."
        )
    if not all(name.endswith(".tar") for name in expanded):
        return None
    paths = []
    for name in expanded:
        matches = [name] if os.path.lexists(name) else sorted(glob.glob(name, recursive=True))  # noqa: PTH207
        if not matches:
            raise InputError(
                f"no tar shard {name!r} (seen from {str(Path.cwd())!r}), one of {len(expanded)} that {pattern!r} names."
            )
        paths += [Path(match) for match in matches]
    return paths


def expand_braces(pattern: str) -> Iterator[str]:
    """All strings that `pattern` stands for: `{000..009}` counts, with as many digits; `{a,b}` lists.

    Raises:
        InputError: more than a million.
    """
    found = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", pattern)
    if found is None:
        yield pattern
        return
    if found[3] is not None:
        middles: Iterator[str] = iter(found[3].split(","))
    else:
        first, last = int(found[1]), int(found[2])
        if abs(last - first) >= MAX_EXPANSIONS:
            raise InputError(f"{found[0]} in {pattern!r} counts further than to a million.")
        step = 1 if last >= first else -1
        middles = (str(n).zfill(len(found[1])) for n in range(first, last + step, step))
    for middle in middles:
        yield from expand_braces(pattern[: found.start()] + middle + pattern[found.end() :])


def index_shard(path: Path) -> ShardIndex:
    """Find the pictures in an uncompressed tar archive, reading its headers only.

    Raises:
        InputError: no tar archive, or a damaged or incomplete one.
    """
    names: list[str] = []
    places: list[tuple[int, int]] = []
    others: dict[str, None] = {}
    latest = ""
    end, last = path.stat().st_size, -1
    try:
        with open_regular(path) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            while (member := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # it would keep a million of them
                if member.offset <= last or member.size < 0 or member.offset_data + member.size > end:
                    raise tarfile.ReadError(f"{member.name!r} does not lie inside the archive")
                last, latest = member.offset, member.name
                if not member.isreg() or member.issparse():
                    continue
                if _is_picture(member.name):
                    names.append(member.name)
                    places.append((member.offset_data, member.size))
                else:
                    others[_extension(member.name)] = None
    except ImageError as error:
        raise InputError(str(error)) from error
    except (tarfile.TarError, OSError, ValueError, OverflowError, RecursionError) as error:
        what = f"is damaged or incomplete after {latest!r}" if latest else "is no tar archive, or a compressed one"
        raise InputError(f"{str(path)!r} {what} ({error}). Fetch it again, or leave it out.") from error
    return ShardIndex(
        names=PackedText(names),
        places=np.array(places, dtype=np.int64).reshape(-1, 2),
        others=PackedText(list(others)[:100]),
    )


def _cached_index(path: Path) -> ShardIndex:
    """The index of a shard, from the cache if the file is what it was."""
    try:
        status = path.stat()
    except OSError as error:
        raise InputError(f"tar shard {str(path)!r} cannot be opened: {error.strerror}.") from error
    key = f"{os.path.realpath(path)}\0{status.st_size}\0{status.st_mtime_ns}\0{INDEX_VERSION}"
    cached = cache_dir() / "shards" / f"{hashlib.sha256(key.encode('utf-8', 'surrogateescape')).hexdigest()}.npz"
    try:
        with cached.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            return ShardIndex(
                names=PackedText.of(stored["names"], stored["name_ends"]),
                places=stored["places"],
                others=PackedText.of(stored["others"], stored["other_ends"]),
            )
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):  # none yet, or not a whole one
        pass
    index = index_shard(path)
    try:
        with atomic_path(cached) as scratch:
            np.savez(
                scratch,
                names=index.names.data.numpy(),
                name_ends=index.names.ends.numpy(),
                places=index.places,
                others=index.others.data.numpy(),
                other_ends=index.others.ends.numpy(),
            )
    except OSError:  # a cache that cannot be written to: the index is made again next time
        pass
    return index


def _extension(name: str) -> str:
    """What follows the first dot of the last part of a name, as WebDataset has it."""
    return name.rpartition("/")[2].partition(".")[2].lower()


def _is_picture(name: str) -> bool:
    return not name.rpartition("/")[2].startswith(".") and f".{_extension(name)}" in IMAGE_SUFFIXES
