"""Owns running one scene by the workers of a Ray cluster: runs of neighbouring rows of tiles, committed by each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from densedino.errors import InputError
from densedino.features.scene_sink import SceneSink

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from densedino.features.extractor import FeatureExtractor
    from densedino.features.spread import RayRunner
    from densedino.geo.extraction import SceneJob, SceneOptions

__all__ = ["RayScene"]

_RUNS = 2  # for each worker: a run more costs the row of tiles above it, a run lost costs its time


@dataclass(frozen=True)
class RayScene:
    """Computes rows of tiles of a scene in Ray's workers, each with a model and an open scene of its own."""

    ray: RayRunner
    load: Callable[[], FeatureExtractor]
    """Loads the same model in another process: a partial of `dd.load`."""

    def __call__(self, job: SceneJob, path: Path, rows: Sequence[int], *, advance: Callable[[int], None]) -> None:
        """Compute `rows` that are not in the store at `path` yet, and commit them."""
        if not rows:
            return
        gpu = job.dino.device.type == "cuda"
        runs = _runs(rows, _RUNS * self.ray.slots(gpu=gpu))
        arguments = {
            "load": self.load,
            "sources": [_absolute(source) for source in job.scene.sources],
            "options": job.options,
            "path": path.absolute(),
            "fingerprint": job.metadata["fingerprint"],
            "threads": 1 if gpu else max(1, torch.get_num_threads() // self.ray.slots(gpu=gpu)),
        }
        for done in self.ray.run(runs, _Worker, arguments=arguments, gpu=gpu):
            advance(done["tiles"])


def _absolute(source: str) -> str:
    return source if "://" in source else str(Path(source).absolute())


def _runs(rows: Sequence[int], count: int) -> list[list[int]]:
    """About `count` runs of neighbours, of nearly equal length."""
    length = -(-len(rows) // count)
    runs: list[list[int]] = []
    for row in sorted(rows):
        if not runs or runs[-1][-1] != row - 1 or len(runs[-1]) == length:
            runs.append([])
        runs[-1].append(row)
    return runs


class _Worker:
    """In a process of Ray's: a run of rows in, the number of tiles out. A run may come twice."""

    def __init__(
        self,
        *,
        load: Callable[[], FeatureExtractor],
        sources: list[str],
        options: SceneOptions,
        path: Path,
        fingerprint: str,
        threads: int,
    ) -> None:
        from densedino.geo.extraction import SceneJob

        torch.set_num_threads(threads)
        self._job = SceneJob(load(), sources, options)
        if self._job.metadata["fingerprint"] != fingerprint:
            self.close()
            raise InputError(
                "a worker sees another scene or loads other weights than the process that began. Put the same files "
                "and one version of densedino on every machine."
            )
        self._path = path

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        sink = SceneSink(self._path, self._job.metadata)
        left = [r for r in row["task"] if r not in sink.done]
        for blocks in self._job.mosaic().rows(left):
            sink.append(blocks)
        return {"tiles": len(row["task"]) * self._job.plan.shape[1]}

    def close(self) -> None:
        """Close the scene."""
        self._job.scene.close()
