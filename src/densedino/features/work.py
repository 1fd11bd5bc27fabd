"""Owns doing the jobs of an extraction: in this process, or a chunk at a time in the workers of a Ray cluster."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch

from densedino.errors import InputError
from densedino.features.pipeline import Pipeline
from densedino.features.quarantine import Entry
from densedino.features.sinks import LanceSink

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from densedino.features.extractor import FeatureExtractor
    from densedino.features.planning import Job, Settings
    from densedino.features.quarantine import Quarantine
    from densedino.features.sinks import Sink
    from densedino.features.spread import RayRunner
    from densedino.images.transforms import Transform

__all__ = ["Outcome", "RayExtraction", "Runner", "Work", "run_here"]


@dataclass(frozen=True)
class Work:
    """What all jobs have in common."""

    dino: FeatureExtractor
    sink: Sink
    quarantine: Quarantine
    settings: Settings
    layers: tuple[int, ...]
    every: int
    metadata: dict[str, Any]
    advance: Callable[[int], None]


@dataclass
class Outcome:
    """What jobs came to."""

    rows: int = 0
    shrunk: int = 0
    failed: Sequence[Entry] = ()


class Runner(Protocol):
    """Does jobs, and returns when all of them stand."""

    def __call__(self, work: Work, jobs: Sequence[Job], *, largest_tokens: int) -> Outcome:
        """Raise what `Pipeline.run` raises."""


def run_here(work: Work, jobs: Sequence[Job], *, largest_tokens: int) -> Outcome:
    """See `Runner`."""
    pipeline = Pipeline(
        work.dino,
        work.sink,
        work.quarantine,
        work.settings,
        layers=work.layers,
        every=work.every,
        advance=work.advance,
    )
    pipeline.run(jobs, largest_tokens=largest_tokens)
    return Outcome(pipeline.rows, pipeline.shrunk, pipeline.failed)


@dataclass(frozen=True)
class RayExtraction:
    """A `Runner`: chunks of jobs by Ray's workers, each with a model of its own and the same store."""

    ray: RayRunner
    load: Callable[[], FeatureExtractor]
    """Loads the same model in another process: a partial of `dd.load`."""

    def __call__(self, work: Work, jobs: Sequence[Job], *, largest_tokens: int) -> Outcome:
        """See `Runner`."""
        tasks: dict[tuple[str, int], list[Job]] = {}
        for job in jobs:
            away = replace(job, item=replace(job.item, path=job.item.path.absolute()))
            place = (job.item.key, 0) if job.item.is_video else ("", job.position // work.settings.segment_images)
            tasks.setdefault(place, []).append(away)
        arguments = {
            "load": self.load,
            "transform": work.dino.transform,
            "fingerprint": work.dino.fingerprint,
            "path": work.sink.path.absolute(),
            "metadata": work.metadata,
            "settings": replace(work.settings, streams=1, decoders=1),
            "layers": work.layers,
            "every": work.every,
        }
        rows, shrunk = 0, 0
        failed: list[Entry] = []
        gpu = work.dino.device.type == "cuda"
        for done in self.ray.run(list(tasks.values()), _Worker, arguments=arguments, gpu=gpu) if tasks else ():
            entries = [Entry(**entry) for entry in done["failed"]]
            work.quarantine.add(entries)
            rows, shrunk, failed = rows + done["rows"], shrunk + done["shrunk"], failed + entries
            work.advance(done["jobs"])
        return Outcome(rows, shrunk, failed)


class _Failures:
    """Stands where a quarantine does: one process alone writes that file."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []

    def add(self, entries: Iterable[Entry]) -> None:
        self.entries += entries


class _Worker:
    """In a process of Ray's: a chunk of jobs in, what they came to out. A chunk may come twice."""

    def __init__(
        self,
        *,
        load: Callable[[], FeatureExtractor],
        transform: Transform,
        fingerprint: str,
        path: Path,
        metadata: dict[str, Any],
        settings: Settings,
        layers: tuple[int, ...],
        every: int,
    ) -> None:
        torch.set_num_threads(settings.threads)
        self._dino = load().with_transform(transform)
        self._settings, self._layers, self._every = settings, layers, every
        if self._dino.fingerprint != fingerprint:
            raise InputError(
                f"a worker loads {self._dino}, not what the process that began has. Install one version of densedino "
                "and put the same weights on every machine."
            )
        self._sink = LanceSink(path, metadata)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        jobs: list[Job] = row["task"]
        left = [job for job in jobs if job.item.is_video or self._sink.stamp(job.item.key) != job.stamp]
        failures: Any = _Failures()
        pipeline = Pipeline(
            self._dino,
            self._sink,
            failures,
            self._settings,
            layers=self._layers,
            every=self._every,
            advance=lambda count: None,
        )
        pipeline.run(left)
        failed = [asdict(entry) for entry in failures.entries]
        return {"jobs": len(jobs), "rows": pipeline.rows, "shrunk": pipeline.shrunk, "failed": failed}
