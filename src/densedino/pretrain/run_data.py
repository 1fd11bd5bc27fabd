"""Owns reading a run's folder for the report: what was logged, what was looked at, and what follows from the two.

Everything may be missing or cut short: a run that was killed has a report too.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from densedino.errors import InputError
from densedino.pretrain.charts import Series
from densedino.pretrain.diagnosis import best_dense_look
from densedino.pretrain.filmstrip import filmstrip
from densedino.pretrain.look_files import LookRecord, read_fixed, read_looks, read_patches
from densedino.pretrain.meters import drift_matrix

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

__all__ = ["Drifts", "Film", "RunData", "flat_numbers", "read_run"]

COMPARED = 24
"""Looks that are compared with each other, at most."""
FRAMES = 8
"""Looks in the filmstrip, at most."""
ROWS = 6


@dataclass(frozen=True, kw_only=True)
class Film:
    """Fixed images and the PCA of their patches over time."""

    names: Sequence[str]
    photos: Sequence[Image.Image]
    steps: Sequence[int]
    frames: Sequence[Sequence[Image.Image]]
    """By image, then by look."""


@dataclass(frozen=True, kw_only=True)
class Drifts:
    """How the patch similarities of looks differ from each other."""

    steps: Sequence[int]
    matrix: Tensor
    """[n, n]: `drift_matrix`."""
    reference: int
    """Step of the look at which patches were best; one of `steps`."""

    @property
    def from_reference(self) -> list[float]:
        """By look."""
        values: list[float] = self.matrix[list(self.steps).index(self.reference)].tolist()
        return values


@dataclass(frozen=True, kw_only=True)
class RunData:
    """All that the report shows."""

    folder: Path
    config: Mapping[str, Any]
    metrics: Sequence[Mapping[str, float]]
    """One entry a step, of numbers by flat name: "step", "losses/dino"."""
    looks: Sequence[LookRecord]
    drifts: Drifts | None
    film: Film | None
    quarantine: Sequence[Mapping[str, Any]]

    @property
    def stages(self) -> list[tuple[str, int, int]]:
        """Name, first step and end of each stage, in steps of the run."""
        found, start = [], 0
        for stage in self.config.get("stages", ()):
            found.append((str(stage["name"]), start, start + int(stage["steps"])))
            start += int(stage["steps"])
        return found or [("run", 0, max(1, self.step))]

    @property
    def step(self) -> int:
        """Optimizer steps taken, as far as is known."""
        last = [int(line["step"]) for line in self.metrics[-1:]] + [look.step for look in self.looks[-1:]]
        return max(last, default=0)

    @property
    def stage(self) -> str:
        """The present stage's name."""
        return next((name for name, _, stop in self.stages if self.step < stop), self.stages[-1][0])

    def logged(self, prefix: str) -> list[Series]:
        """The metrics called `prefix`, or `prefix`/…, labelled by what comes after."""
        names = dict.fromkeys(n for line in self.metrics for n in line if n == prefix or n.startswith(f"{prefix}/"))
        found = []
        for name in names:
            label = name.removeprefix(prefix).removeprefix("/").replace("_", " ") or prefix.replace("_", " ")
            points = [(line["step"], line[name]) for line in self.metrics if name in line]
            found.append(Series(label=label, steps=[s for s, _ in points], values=[v for _, v in points]))
        return found

    def measured(self, labels: Mapping[str, str]) -> list[Series]:
        """What looks measured, by the measure's name, each with its label; what was never measured is left out."""
        found = []
        for name, label in labels.items():
            points = [(look.step, look.measures[name]) for look in self.looks if name in look.measures]
            if points:
                found.append(Series(label=label, steps=[s for s, _ in points], values=[v for _, v in points]))
        return found

    def total(self, name: str) -> float:
        """The last value of a metric; 0 if it was never logged."""
        return next((line[name] for line in reversed(self.metrics) if name in line), 0.0)


def flat_numbers(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Numbers of nested mappings by flat name, "losses/dino"; everything else is passed over."""
    for key, value in data.items():
        if isinstance(value, dict):
            yield from flat_numbers(value, f"{prefix}{key}/")
        elif isinstance(value, bool | int | float):
            yield f"{prefix}{key}", float(value)


def read_run(folder: str | os.PathLike[str]) -> RunData:
    """Read what there is.

    Raises:
        InputError: the folder holds no run.
    """
    folder = Path(folder)
    if not (folder / "config.json").exists() and not (folder / "metrics.jsonl").exists():
        raise InputError(f"{str(folder)!r} holds no run: neither config.json nor metrics.jsonl is in it.")
    by_step = {
        int(numbers["step"]): numbers
        for numbers in map(dict, map(flat_numbers, _lines(folder / "metrics.jsonl")))
        if "step" in numbers
    }
    looks = read_looks(folder)
    comparable = _comparable(looks)
    best = best_dense_look(comparable)
    chosen = [comparable[i] for i in _spread(len(comparable), COMPARED)]
    chosen += [look for look in (best, comparable[-1] if comparable else None) if look and look not in chosen]
    chosen.sort(key=lambda look: look.step)
    patches = {look.step: read_patches(folder, look.step) for look in chosen}
    drifts = None
    if best is not None and len(chosen) > 1:
        steps = [look.step for look in chosen]
        drifts = Drifts(
            steps=steps, matrix=drift_matrix([p.flatten(1, 2) for p in patches.values()]), reference=best.step
        )
    config = folder / "config.json"
    return RunData(
        folder=folder,
        config=json.loads(config.read_text(encoding="utf-8")) if config.exists() else {},
        metrics=[by_step[step] for step in sorted(by_step)],
        looks=looks,
        drifts=drifts,
        film=_film(folder, patches),
        quarantine=list(_lines(folder / "quarantine.jsonl")),
    )


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a JSONL file; a run that was killed may have left half a line."""
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                yield dict(json.loads(line))
            except ValueError:
                continue


def _comparable(looks: Sequence[LookRecord]) -> list[LookRecord]:
    """The looks at the same fixed images as the last one."""
    seen = [look for look in looks if not look.failed]
    return [look for look in seen if (look.names, look.grid) == (seen[-1].names, seen[-1].grid)]


def _spread(count: int, wanted: int) -> list[int]:
    """`wanted` places (at most all) from the first to the last of `count`, evenly."""
    return list(range(count)) if count <= wanted else [i * (count - 1) // (wanted - 1) for i in range(wanted)]


def _film(folder: Path, patches: Mapping[int, Tensor]) -> Film | None:
    fixed = read_fixed(folder)
    if fixed is None or not patches:
        return None
    names, photos = fixed
    steps = sorted(patches)
    steps = [steps[i] for i in _spread(len(steps), FRAMES)]
    count = min(ROWS, len(photos), len(patches[steps[-1]]))
    frames = [filmstrip([patches[step][i] for step in steps]) for i in range(count)]
    return Film(
        names=names[:count],
        photos=[Image.fromarray(photo.numpy()) for photo in photos[:count]],
        steps=steps,
        frames=[[Image.fromarray(frame.numpy()) for frame in row] for row in frames],
    )
