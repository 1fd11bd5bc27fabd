"""Owns what an extraction will do, before it does it: what is left to do, and what that takes in memory and on disk."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from PIL import Image

from densedino.engines.streamed import StreamEngine
from densedino.errors import ImageError, StoreError
from densedino.features.quarantine import stamp_of
from densedino.images.containers import FORMATS, open_regular
from densedino.images.datasets import sha256_file
from densedino.models.catalog import ViTSpec

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from densedino.features.extractor import FeatureExtractor
    from densedino.features.quarantine import Quarantine, Stamp
    from densedino.features.sinks import Sink
    from densedino.images.datasets import Item, Listing

__all__ = ["AHEAD_BYTES", "Job", "Plan", "Settings", "Survey", "absolute", "image_bytes", "left_to_do", "survey"]

AHEAD_BYTES = 2**28
"""Of pictures that are prepared before their turn."""

_MAX_STREAMS = 8  # of a CPU: more would multiply the memory of activations
_SAMPLE = 256  # files whose headers are read for the estimate


@dataclass(frozen=True)
class Job:
    """An input that is left to do."""

    position: int
    """In the whole listing: what is computed together depends on it, so that a resumed run computes the same."""
    item: Item
    stamp: Stamp | None
    """None if there is no such file."""
    standing: frozenset[str] = frozenset()
    """Of a video: the frames that stand already."""


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What the headers of (a sample of) the images say."""

    images: int
    """Pictures to be done; frames of videos not counted."""
    tokens: int
    """Patches of all images together."""
    largest_tokens: int
    """Of one image."""
    largest_pixels: int
    """Of one source."""
    exact: bool
    """Every header was read, and there are no videos."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How much is done at once."""

    streams: int
    """Batches that the model runs side by side. On a CPU, each on its own share of the cores: no core waits for another
    one after every operation, and decoding on a core does not hold up the rest."""
    threads: int
    """Cores per stream."""
    decoders: int
    """Images that are decoded side by side; on a CPU by the threads of the streams, between batches."""
    batch_size: int | None
    batch_tokens: int
    """A batch has `batch_size` images, or as many as have about that many patches."""
    separate: bool
    """Whether decoding has threads of its own, beside those of the model."""
    segment_images: int
    segment_bytes: int
    segment_flops: float
    """A segment ends with whichever is reached first. What a killed process loses is a segment or two."""

    @classmethod
    def choose(cls, device: torch.device, *, inputs: int, batch_size: int | None, streaming: bool = False) -> Settings:
        """Settings for a device and a number of inputs (of the whole listing, so that a resumed run has the same).

        `streaming`: the weights are read from disk once per batch, so a batch is large, and there is one at a time.
        """
        cores = torch.get_num_threads()
        if streaming:
            return cls(
                streams=1,
                threads=cores,
                decoders=1,
                batch_size=batch_size,
                batch_tokens=8192,
                separate=True,
                segment_images=128,
                segment_bytes=2**28,
                segment_flops=1e15,
            )
        if device.type != "cpu":
            return cls(
                streams=1,
                threads=1,
                decoders=min(cores, 16),
                batch_size=batch_size,
                batch_tokens=32_768,
                separate=True,
                segment_images=512,
                segment_bytes=2**30,
                segment_flops=5e14,
            )
        streams = max(1, min(cores, _MAX_STREAMS, inputs // (2 * (batch_size or 1))))
        return cls(
            streams=streams,
            threads=cores // streams,
            decoders=streams,
            batch_size=batch_size,
            batch_tokens=8 * 196,
            separate=False,
            segment_images=128,
            segment_bytes=2**28,
            segment_flops=5e12,
        )

    def batch_of(self, tokens: int) -> int:
        """Images per batch, of `tokens` patches each."""
        return self.batch_size or max(1, self.batch_tokens // tokens)

    def memory_bytes(self, dino: FeatureExtractor, survey: Survey, *, layers: int) -> int:
        """About what is needed at most, on the host and the device together, besides Python and PyTorch themselves.

        Weights, activations, segments in flight, pictures prepared ahead, and sources being decoded.
        """
        if isinstance(dino.engine, StreamEngine):
            return dino.engine.memory  # of the whole process
        spec = dino.model.spec
        # Numbers per patch that live at the same time: of a block, or of the first stage, which has 64 per patch.
        width = spec.hidden_dim + 12 * spec.embed_dim if isinstance(spec, ViTSpec) else 64 * 6 * spec.dims[0]
        weights = sum(p.numel() * p.element_size() for p in dino.model.parameters())
        largest = max(survey.largest_tokens, 1)
        activations = self.batch_of(largest) * largest * width * 4
        image = image_bytes(dino, largest, layers=layers)
        in_flight = min(image * survey.images, 3 * self.segment_bytes + image)
        ahead = min(image * survey.images, max(AHEAD_BYTES, image * (self.decoders + 1)))
        decoding = self.decoders * survey.largest_pixels * 12
        copies = 1 if (dino.engine.name, dino.precision) == ("eager", "fp32") else 2
        return copies * weights + self.streams * activations + in_flight + ahead + decoding


def image_bytes(dino: FeatureExtractor, tokens: int, *, layers: int) -> int:
    """What an image of so many patches holds while it is in flight: its pixels and its features."""
    spec = dino.model.spec
    return tokens * (dino.transform.in_chans * spec.stride**2 * 4 + (1 + layers) * spec.embed_dim * 2)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is about to happen."""

    inputs: int
    ignored: int
    """Files in the folders given that are no pictures."""
    jobs: tuple[Job, ...]
    stale: tuple[str, ...]
    """Keys of rows whose source has another content now: they are taken out first, and computed again."""
    done: int
    """Inputs whose features stand."""
    held: int
    """Inputs that failed before, and are not tried again."""
    survey: Survey
    disk_bytes: int
    memory_bytes: int

    @property
    def videos(self) -> int:
        """How many of the jobs are videos."""
        return sum(job.item.is_video for job in self.jobs)


def absolute(path: Path) -> str:
    """An absolute path as text that can be stored, also if its name is no UTF-8."""
    return os.path.abspath(path).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")  # noqa: PTH100 (keeps links)


def make_plan(
    dino: FeatureExtractor,
    listing: Listing,
    *,
    limit: int | None,
    sink: Sink,
    quarantine: Quarantine,
    settings: Settings,
    layers: Sequence[int],
) -> Plan:
    """Compare the first `limit` inputs with what stands, and estimate what the rest takes. Changes nothing.

    Raises:
        StoreError: a row stands under the key of an input, but of another file with other content.
    """
    items = listing.items[:limit]
    jobs, stale, held = left_to_do(items, sink=sink, quarantine=quarantine)
    seen = survey(jobs, dino)
    return Plan(
        inputs=len(items),
        ignored=listing.ignored,
        jobs=tuple(jobs),
        stale=tuple(stale),
        done=len(items) - len(jobs) - held,
        held=held,
        survey=seen,
        disk_bytes=seen.tokens * dino.model.embed_dim * 2 * (1 + len(layers)),
        memory_bytes=settings.memory_bytes(dino, seen, layers=len(layers)),
    )


def left_to_do(items: Sequence[Item], *, sink: Sink, quarantine: Quarantine) -> tuple[list[Job], list[str], int]:
    """Jobs, stale keys, and how many inputs are held in quarantine.

    Raises:
        StoreError: a row stands under the key of an input, but of another file with other content.
    """
    jobs: list[Job] = []
    stale: list[str] = []
    held = 0
    for position, item in enumerate(items):
        try:
            stamp = stamp_of(item.path.stat())
        except (OSError, ValueError):
            stamp = None
        standing, complete = sink.frames(item.key) if item.is_video else ([], False)
        row = standing[0] if standing else item.key
        before = None if item.is_video and not standing else sink.stamp(row)
        if before is not None and stamp is not None and before != stamp and _changed(row, item, sink):
            stale += standing or [row]
            before, standing, complete = None, [], False
        if before is not None and (complete or not item.is_video):
            continue
        if quarantine.holds(item.key, stamp):
            held += 1
            continue
        jobs.append(Job(position, item, stamp, frozenset(standing)))
    return jobs, stale, held


def _changed(row: str, item: Item, sink: Sink) -> bool:
    """Whether the file of a row that stands has another content now; a touched or copied file has not."""
    standing = sink.standing(row)
    try:
        if sha256_file(item.path) == standing.sha256:
            return False
    except ImageError:
        return False
    if standing.source != absolute(item.path):
        raise StoreError(
            f"{str(sink.path)!r} holds features of {standing.source!r} under the key {item.key!r}, which now means "
            f"{absolute(item.path)!r}, another picture. Fix: give absolute paths, or another folder with -o."
        )
    return True


def survey(jobs: Sequence[Job], dino: FeatureExtractor) -> Survey:
    """Read the headers of up to 256 images, spread evenly, and estimate the rest from them."""
    images = [job.item.path for job in jobs if not job.item.is_video]
    step = max(1, -(-len(images) // _SAMPLE))
    sizes = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for path in images[::step]:
            try:
                with open_regular(path) as file, Image.open(file, formats=FORMATS) as image:
                    sizes.append((image.height, image.width))
            except Exception:  # it will be quarantined with its reason when its turn comes; here only sizes are guessed
                continue
    tokens = []
    for size in sizes:
        try:
            grid = dino.transform.geometry(*size).grid
        except ImageError:
            continue
        tokens.append(grid[0] * grid[1])
    mean = sum(tokens) / len(tokens) if tokens else 0
    return Survey(
        images=len(images),
        tokens=round(mean * (len(images) if step > 1 else len(tokens))),
        largest_tokens=max(tokens, default=0),
        largest_pixels=max((height * width for height, width in sizes), default=0),
        exact=step == 1 and len(images) == len(jobs),
    )
