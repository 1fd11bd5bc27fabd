"""Owns the moving parts of an extraction: decoding, the model and writing at the same time, in bounded memory.

Inputs are cut into segments that are computed and committed as a whole. Which images share a segment and a batch
depends on the full listing and on the images alone, never on timing: an interrupted run that goes on computes the
same batches, and so the same bits, as one that was never interrupted.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from densedino.errors import ImageError, InputError
from densedino.features.intake import Source, prepare, sources_of
from densedino.features.layout import Row
from densedino.features.planning import AHEAD_BYTES, absolute, image_bytes
from densedino.features.quarantine import Entry
from densedino.models.catalog import ViTSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from densedino.features.extractor import FeatureExtractor
    from densedino.features.planning import Job, Settings
    from densedino.features.quarantine import Quarantine
    from densedino.features.sinks import Sink
    from densedino.images.transforms import Prepared

__all__ = ["Pipeline"]

_MOST_AHEAD = 64  # pictures


@dataclass
class _Tokens:
    """Features of one picture in float16: [D], [R, D], [h, w, D], and those of further layers."""

    picture: Prepared
    """Without its pixels."""
    cls: NDArray[np.float16]
    registers: NDArray[np.float16]
    patches: NDArray[np.float16]
    layers: dict[int, tuple[NDArray[np.float16], NDArray[np.float16]]]


@dataclass
class _Segment:
    """What is committed at once: pictures, each with the batch that it is in and its place there."""

    chunk: tuple[str, int] | None = None
    sources: list[Source] = field(default_factory=list)
    places: dict[str, tuple[Future[list[_Tokens | str]], int]] = field(default_factory=dict)
    waiting: dict[tuple[int, ...], list[Source]] = field(default_factory=dict)
    """For more of the same padded size."""
    held_bytes: int = 0
    flops: float = 0.0


class Pipeline:
    """Prepares pictures, runs the model on them, and commits their features in order. `run` once."""

    def __init__(
        self,
        dino: FeatureExtractor,
        sink: Sink,
        quarantine: Quarantine,
        settings: Settings,
        *,
        layers: Sequence[int],
        every: int,
        advance: Callable[[int], None],
    ) -> None:
        self._dino, self._sink, self._quarantine, self._settings = dino, sink, quarantine, settings
        self._layers, self._every, self._advance = tuple(layers), every, advance
        self._parameters = sum(p.numel() for p in dino.model.parameters())
        self._unbounded = replace(dino.transform, max_tokens=None)
        self._largest = 0
        self.rows = 0
        """Committed."""
        self.shrunk = 0
        """Of these, made smaller to have no more than `max_tokens` patches."""
        self.failed: list[Entry] = []

    def run(self, jobs: Sequence[Job], *, largest_tokens: int = 0) -> None:
        """Do the jobs.

        Raises:
            StoreError: the output cannot be written any more.
            InputError: there is not enough memory for a batch.
        """
        self._largest = image_bytes(self._dino, largest_tokens, layers=len(self._layers))
        before = torch.get_num_threads()
        torch.set_num_threads(self._settings.threads)
        writes: deque[Future[None]] = deque()
        try:
            with _pools(self._settings) as (decoders, model, writer):
                for segment in self._segments(self._prepared(jobs, decoders), model):
                    writes.append(writer.submit(self._commit, segment))
                    if len(writes) > 2:  # one is written, one waits, one is filled
                        writes.popleft().result()
                for write in writes:
                    write.result()
        finally:
            torch.set_num_threads(before)

    def _prepared(self, jobs: Sequence[Job], decoders: ThreadPoolExecutor) -> Iterator[Source]:
        """Sources in order, prepared or failed; a few are prepared ahead."""
        ahead: deque[Future[Source]] = deque()
        for source in sources_of(jobs, every=self._every, chunk_size=self._settings.segment_images):
            ahead.append(decoders.submit(prepare, source, self._dino.transform))
            while len(ahead) > self._room():
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()

    def _room(self) -> int:
        """How many may be prepared ahead; few until it is known how large they are."""
        fit = min(_MOST_AHEAD, AHEAD_BYTES // self._largest) if self._largest else 0
        return max(self._settings.decoders, fit)

    def _bytes(self, prepared: Prepared) -> int:
        return image_bytes(self._dino, prepared.valid.numel(), layers=len(self._layers))

    def _flops(self, tokens: int) -> float:
        """About; of attention only what grows with the square."""
        spec = self._dino.model.spec
        square = 4.0 * spec.depth * spec.embed_dim if isinstance(spec, ViTSpec) else 0.0
        return tokens * (2.0 * self._parameters + square * tokens)

    def _segments(self, sources: Iterator[Source], model: ThreadPoolExecutor) -> Iterator[_Segment]:
        """Sources as segments, whose batches are on their way."""
        segment = _Segment()
        for source in sources:
            full = segment.held_bytes >= self._settings.segment_bytes or segment.flops >= self._settings.segment_flops
            if segment.sources and (full or segment.chunk != source.chunk):
                yield self._closed(segment, model)
                segment = _Segment()
            segment.chunk = source.chunk
            segment.sources.append(source)
            if source.prepared is None:
                continue
            tokens = source.prepared.valid.numel()
            held = self._bytes(source.prepared)
            self._largest = max(self._largest, held)
            segment.held_bytes += held
            segment.flops += self._flops(tokens)
            shape = tuple(source.prepared.pixels.shape)
            segment.waiting.setdefault(shape, []).append(source)
            if len(segment.waiting[shape]) == self._settings.batch_of(tokens):
                self._start(segment, segment.waiting.pop(shape), model)
        if segment.sources:
            yield self._closed(segment, model)

    def _closed(self, segment: _Segment, model: ThreadPoolExecutor) -> _Segment:
        while segment.waiting:
            self._start(segment, segment.waiting.popitem()[1], model)
        return segment

    def _start(self, segment: _Segment, sources: list[Source], model: ThreadPoolExecutor) -> None:
        future = model.submit(self._forward, [source.prepared for source in sources if source.prepared is not None])
        for place, source in enumerate(sources):
            segment.places[source.item.key] = (future, place)
            source.prepared = None  # the task alone holds the pixels from now on, until it is done

    def _forward(self, prepared: list[Prepared]) -> list[_Tokens | str]:
        """Features of a batch, or why there are none."""
        try:
            features = self._dino.run(prepared, layers=self._layers)
        except InputError as error:  # not finite: it may be one picture's fault
            if len(prepared) == 1:
                return [str(error)]
            return [self._forward([one])[0] for one in prepared]
        except RuntimeError as error:
            if "memory" not in str(error):
                raise
            raise InputError(
                f"not enough memory on {self._dino.device} for a batch of {len(prepared)} pictures of "
                f"{prepared[0].valid.numel():,} patches each. Fix: a smaller --batch-size or --max-tokens."
            ) from error
        finite = torch.ones(len(prepared), dtype=torch.bool)

        def half(tensor: Tensor) -> NDArray[np.float16]:
            nonlocal finite
            converted = tensor.to(torch.float16).cpu()
            finite = finite & converted.flatten(1).isfinite().all(1)
            return converted.numpy()

        cls, registers, patches = half(features.cls), half(features.registers), half(features.patches)
        layers = {i: (half(tokens.cls), half(tokens.patches)) for i, tokens in features.layers.items()}
        self._advance(len(prepared))
        return [
            _Tokens(one, cls[i], registers[i], patches[i], {n: (c[i], p[i]) for n, (c, p) in layers.items()})
            if finite[i]
            else "the features do not fit into float16 (largest value 65504), in which they are kept. "
            "Fix: leave out --layers; if that is not it, the weights are damaged."
            for i, one in enumerate(replace(one, pixels=torch.empty(0)) for one in prepared)
        ]

    def _commit(self, segment: _Segment) -> None:
        """Rows first: were the process killed in between, the failed ones would be tried again."""
        rows: list[Row] = []
        failed: list[Entry] = []
        for source in segment.sources:
            batch, place = segment.places.get(source.item.key, (None, 0))
            result = batch.result()[place] if batch is not None else source.failure
            if isinstance(result, str):
                failed.append(_entry(source, result))
                self._advance(batch is None)
            else:
                rows.append(_row(source, result))
        if rows:
            self._sink.append(rows)
        self._quarantine.add(failed)
        self.rows += len(rows)
        self.failed += failed
        if self._dino.transform.max_tokens is not None:
            self.shrunk += sum(self._is_shrunk(row) for row in rows)

    def _is_shrunk(self, row: Row) -> bool:
        try:
            return self._unbounded.geometry(*row.source_size).input_size != row.input_size
        except ImageError:  # larger than anything that could be resized
            return True


def _entry(source: Source, reason: str) -> Entry:
    size, mtime_ns = source.stamp or (None, None)
    return Entry(key=source.item.key, path=absolute(source.item.path), reason=reason, size=size, mtime_ns=mtime_ns)


def _row(source: Source, tokens: _Tokens) -> Row:
    if source.stamp is None:
        raise ImageError(f"{str(source.item.path)!r} is gone.")
    return Row(
        key=source.item.key,
        source=absolute(source.item.path),
        sha256=source.sha256,
        stamp=source.stamp,
        frame=source.item.frame,
        last_frame=source.last_frame,
        source_size=tokens.picture.source_size,
        input_size=tokens.picture.input_size,
        grid=(tokens.picture.valid.shape[0], tokens.picture.valid.shape[1]),
        cls=tokens.cls,
        registers=tokens.registers,
        patches=tokens.patches,
        valid=tokens.picture.valid.numpy(),
        layers=tokens.layers,
    )


@contextmanager
def _pools(settings: Settings) -> Iterator[tuple[ThreadPoolExecutor, ThreadPoolExecutor, ThreadPoolExecutor]]:
    """Threads that decode, that run the model, and that write; on a CPU the first two are the same."""

    def pool(workers: int, name: str) -> ThreadPoolExecutor:
        # How many cores an operation uses is a setting of the thread that calls it.
        return ThreadPoolExecutor(workers, name, initializer=torch.set_num_threads, initargs=(settings.threads,))

    decoders = pool(settings.decoders, "decode")
    model = pool(settings.streams, "model") if settings.separate else decoders
    writer = ThreadPoolExecutor(1, "write")
    try:
        yield decoders, model, writer
    finally:
        for executor in (decoders, model, writer):
            executor.shutdown(wait=False, cancel_futures=True)
        for executor in (decoders, model, writer):
            executor.shutdown(wait=True)
