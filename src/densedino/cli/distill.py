"""Owns `densedino distill`: options to a configuration, what is said before, during and after, and the exit status."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from densedino.cli.options import override
from densedino.errors import InputError

if TYPE_CHECKING:
    from densedino.pretrain.distill import DistillConfig
    from densedino.pretrain.distill_run import DistillProgress, DistillResult
    from densedino.pretrain.feature_run import FeatureDistillConfig
    from densedino.pretrain.settings import RunConfig

__all__ = ["Lines", "note", "run"]

_LINE_EVERY = 10.0  # seconds


def run(
    data: Annotated[tuple[str, ...], tyro.conf.Positional],
    *,
    teacher: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    student: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    out: Annotated[str, tyro.conf.arg(aliases=["-o"])] = "distilled",
    weights: str | None = None,
    layer: int | None = None,
    cached: bool = False,
    size: int = 224,
    steps: int = 10_000,
    batch_size: int = 32,
    seed: int = 0,
    workers: int | None = None,
    precision: Literal["fp32", "bf16"] = "fp32",
    device: str = "auto",
    set: tyro.conf.UseAppendAction[tuple[str, ...]] = (),  # noqa: A002 (the option's name)
    accept_changes: bool = False,
) -> int:
    """Train a small backbone to tell what larger ones say, on your own images, without labels.

    From the features of any weights, or of several: densedino distill photos/ --teacher dinov3_vitb16.pth -o small

    From a run of your own, by its prototypes, two students at once:
    densedino distill photos/ --teacher run/ --student vitt16 --student convnext_tiny -o small

    Run the same command again to go on after an interruption.

    Args:
        data: folders, patterns, .txt lists, .tar shards, hf://NAME:SPLIT, Lance data sets; several are mixed.
        teacher: weights (a file, an https:// URL, a hub id, a name), an .onnx file, or the folder of a run of
            `densedino pretrain`; may be repeated, but for a run.
        student: an architecture, vitt16 if not given; may be repeated where the teacher is a run.
        out: the run's folder.
        weights: start the student from these, rather than from random numbers.
        layer: the teachers' block whose tokens are learnt, from 0; their final ones if not given.
        cached: ask the teachers once about whole pictures, and cut crops from what they say: faster after some epochs.
        size: pixels of the student's crops.
        steps: of the run.
        batch_size: images of an optimizer step, over all processes.
        seed: of the run.
        workers: processes that read images.
        precision: of the student's passes: fp32 or bf16.
        device: auto, cpu, cuda, mps.
        set: any field of the configuration, as in stage.optimizer.clip=1; may be repeated.
        accept_changes: go on with a run although its settings are not those that it had.
    """
    if not data or not teacher:
        raise InputError("densedino distill photos/ --teacher weights.pth: name images, and one or several teachers.")
    students = student or ("vitt16",)

    from densedino.pretrain.feature_distill import TeacherConfig
    from densedino.pretrain.settings import DataConfig, SourceConfig
    from densedino.recipes.distillation import from_features, from_run

    config: DistillConfig | FeatureDistillConfig
    if (before := _configuration(teacher)) is not None:
        config = from_run(teacher[0], before, students=students, steps=steps, batch_size=batch_size)
    elif len(students) > 1:
        raise InputError(
            f"several students ({', '.join(students)}) learn together from the folder of a run of densedino pretrain;"
            " from features, distil one after the other (--cached keeps the teachers' answers)."
        )
    else:
        taught = tuple(TeacherConfig(source=one, layer=layer, cached=cached) for one in teacher)
        config = from_features(taught, model=students[0], size=size, steps=steps, batch_size=batch_size)
    paths = DataConfig(sources=tuple(SourceConfig(path=path) for path in data), workers=workers)
    config = replace(config, data=paths, seed=seed, precision=precision)
    if weights is not None:
        config = replace(config, stage=replace(config.stage, start=weights))
    config = override(config, set)
    return _say_result(_go(config, out=out, device=device, accept_changes=accept_changes))


def _go(config: DistillConfig | FeatureDistillConfig, *, out: str, device: str, accept_changes: bool) -> DistillResult:
    from densedino.pretrain.distill import DistillConfig, distill
    from densedino.pretrain.feature_run import distill_features

    lines = Lines()
    if isinstance(config, DistillConfig):
        return distill(config, output=out, device=device, accept_changes=accept_changes, say=note, advance=lines)
    return distill_features(config, output=out, device=device, accept_changes=accept_changes, say=note, advance=lines)


def _configuration(teachers: tuple[str, ...]) -> RunConfig | None:
    """That of the run whose folder is the teacher, or None."""
    from densedino.config import from_dict
    from densedino.pretrain.settings import RunConfig

    runs = [one for one in teachers if (Path(one) / "snapshots").is_dir()]
    if not runs:
        return None
    if len(teachers) > 1:
        raise InputError(f"{runs[0]!r} is a run, whose prototypes teach alone; leave out the other teachers.")
    return from_dict(RunConfig, json.loads((Path(runs[0]) / "config.json").read_text(encoding="utf-8")))


class Lines:
    """How far a run is, in a line now and then."""

    def __init__(self) -> None:
        self._said = time.perf_counter()

    def __call__(self, progress: DistillProgress) -> None:
        """After each step."""
        now = time.perf_counter()
        if now - self._said < _LINE_EVERY and progress.step < progress.steps:
            return
        self._said = now
        losses = ", ".join(f"{name} {loss:.3f}" for name, loss in progress.losses.items())
        left = f", about {progress.seconds_left:,.0f} s left" if progress.step < progress.steps else ""
        note(
            f"progress   step {progress.step:,} of {progress.steps:,}, loss of {losses},"
            f" {progress.images_per_second:,.1f} images/s{left}"
        )


def note(text: str) -> None:
    """A line to people, who may send the result elsewhere."""
    print(text, file=sys.stderr, flush=True)


def _say_result(result: DistillResult) -> int:
    from densedino.distributed import rank

    if rank() == 0:
        if result.quarantined:
            note(f"{result.quarantined:,} pictures could not be read: quarantine.jsonl")
        if not result.weights:
            print(f"{result.output}: stopped after {result.steps:,} steps. Run the same command again to go on.")
        for path in result.weights:
            print(f"{path}: {result.steps:,} steps done. Use it: densedino extract photos/ --weights {path}")
    return 0 if result.weights else 130
