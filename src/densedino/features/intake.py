"""Owns taking pictures in: which ones come, reading each once, and what is wrong with those that cannot be used."""

from __future__ import annotations

import hashlib
import io
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from densedino.errors import ImageError
from densedino.features.quarantine import stamp_of
from densedino.images.containers import BYTES_PER_PIXEL, open_regular
from densedino.images.datasets import sha256_file, video_frames
from densedino.images.decoding import MAX_PIXELS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from densedino.features.planning import Job
    from densedino.features.quarantine import Stamp
    from densedino.images.datasets import Item
    from densedino.images.decoding import ImageSource
    from densedino.images.transforms import Prepared, Transform

__all__ = ["Source", "prepare", "sources_of"]


@dataclass
class Source:
    """A picture to be prepared: a job, or a frame of one."""

    item: Item
    chunk: tuple[str, int]
    """Pictures of different chunks are never computed together."""
    stamp: Stamp | None
    sha256: str = ""
    array: NDArray[np.uint8] | None = None
    """Of a frame; a picture is yet to be read."""
    last_frame: bool | None = None
    failure: str = ""
    prepared: Prepared | None = None


def sources_of(jobs: Sequence[Job], *, every: int, chunk_size: int) -> Iterator[Source]:
    """One source per picture and per frame, in order; frames that stand already are left out.

    Args:
        jobs: what to read.
        every: of the frames of a video, take each `every`-th.
        chunk_size: pictures of a chunk, by their positions in the listing; of a video, by those among its own frames.
    """
    for job in jobs:
        if job.item.is_video:
            yield from _frames(job, every=every, chunk_size=chunk_size)
        else:
            yield Source(job.item, ("", job.position // chunk_size), job.stamp)


def _frames(job: Job, *, every: int, chunk_size: int) -> Iterator[Source]:
    """Frames that do not stand yet. The last one is known when there is no other."""
    ready: Source | None = None
    try:
        sha256 = sha256_file(job.item.path)
        for number, (item, array) in enumerate(video_frames(job.item, every=every)):
            if ready is not None and ready.item.key not in job.standing:
                yield ready
            chunk = (job.item.key, number // chunk_size)
            ready = Source(item, chunk, job.stamp, sha256, array, last_frame=False)
    except ImageError as error:
        if ready is not None and ready.item.key not in job.standing:
            yield ready
        yield Source(job.item, (job.item.key, -1), job.stamp, failure=str(error))
        return
    if ready is not None:
        ready.last_frame = True
        yield ready


def prepare(source: Source, transform: Transform) -> Source:
    """Read the picture and transform it; what cannot be is noted in `failure`. Never raises for a bad picture."""
    if source.failure:
        return source
    try:
        source.prepared = transform(_read(source) if source.array is None else source.array)
    except ImageError as error:
        source.failure = str(error)
    except (OSError, MemoryError) as error:
        source.failure = f"{str(source.item.path)!r} cannot be read: {error or type(error).__name__}."
    source.array = None
    return source


class _Named(io.BytesIO):
    """The content of a file, and its name for messages."""

    def __init__(self, data: bytes, name: str) -> None:
        super().__init__(data)
        self.name = name


def _read(source: Source) -> ImageSource:
    """The file's bytes, read once for both the hash and the decoder; what cannot be a picture is not read."""
    path = source.item.path
    with open_regular(path) as file:
        status = os.fstat(file.fileno())
        source.stamp = stamp_of(status)
        if status.st_size > BYTES_PER_PIXEL * MAX_PIXELS:
            return path  # is refused with the reason
        data = file.read()
    source.sha256 = hashlib.sha256(data).hexdigest()
    return _Named(data, str(path))
