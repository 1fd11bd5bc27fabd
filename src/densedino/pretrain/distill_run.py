"""Owns a distillation run: whichever way to take a step, batch after batch, to one weights file for each student.

RUN/config.json, metrics.jsonl, snapshots/, quarantine.jsonl as `densedino.pretrain.trainer` has them
RUN/NAME.safetensors       in the end: each student's moving average, which `densedino.load` takes
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors.torch import save_file

import densedino
from densedino.checkpoint import atomic_path
from densedino.distributed import rank, world_size
from densedino.errors import InputError
from densedino.models.catalog import MODELS, create_model
from densedino.pretrain.guard import Guard
from densedino.pretrain.journal import Journal
from densedino.pretrain.loading import Loader
from densedino.pretrain.outcome import OWN_LICENCE
from densedino.pretrain.randomness import counted_seed
from densedino.pretrain.signals import Stop, stop_on_signals
from densedino.pretrain.sitting import agree, first_process, pictures, to_stderr, until_stopped, write_config
from densedino.pretrain.snapshots import (
    Position,
    find_snapshot,
    prune_snapshots,
    read_snapshot,
    training_tensors,
    write_snapshot,
)
from densedino.pretrain.step import step_values
from densedino.weights.card import WeightsCard
from densedino.weights.catalog import WEIGHTS
from densedino.weights.convert import write_weights
from densedino.weights.loading import load_weights

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from torch import nn

    from densedino.models.catalog import ConvNeXtSpec, ViTSpec
    from densedino.models.convnext import ConvNeXt
    from densedino.models.vit import VisionTransformer
    from densedino.pretrain.settings import DataConfig, SnapshotConfig, StageConfig
    from densedino.pretrain.sources import Source
    from densedino.pretrain.step import Batch, StepReport, StepValues

__all__ = ["DistillProgress", "DistillResult", "Job", "make_student", "run_job", "write_student"]


class Job(Protocol):
    """What distinguishes one kind of distillation from another."""

    @property
    def model(self) -> nn.Module:
        """All that a run carries from step to step besides optimizers."""

    @property
    def optimizers(self) -> Mapping[str, torch.optim.Optimizer]:
        """By student."""

    def begin(self, batches: Sequence[Batch]) -> list[str]:
        """Make ready for step 0, or for reading a snapshot; returns what there is to say."""

    def take(self, batch: Batch, *, values: StepValues, step: int) -> Mapping[str, StepReport]:
        """One optimizer step of each student, on the same batch."""

    def finish(self, folder: Path, *, pictures: Sequence[tuple[str, int]]) -> list[Path]:
        """Write each student."""


@dataclass(frozen=True, kw_only=True)
class DistillProgress:
    """What there is to show after a step."""

    step: int
    """Done."""
    steps: int
    images: int
    """Of this step, over all processes."""
    losses: Mapping[str, float]
    """Total loss of each student."""
    images_per_second: float
    seconds_left: float


@dataclass(frozen=True, kw_only=True)
class DistillResult:
    """How a run ended, or where it was stopped."""

    output: Path
    weights: tuple[Path, ...]
    """Files for `densedino.load`; none if the run was stopped before its end."""
    steps: int
    quarantined: int


@dataclass(frozen=True, kw_only=True, eq=False)
class _Run:
    job: Job
    config: dict[str, Any]
    stage: StageConfig
    sources: Sequence[Source]
    data: DataConfig
    snapshots: SnapshotConfig
    seed: int
    calibration: int
    log_every: int
    output: Path
    device: torch.device
    say: Callable[[str], None]
    advance: Callable[[DistillProgress], None]
    stop: Stop

    def go(self, *, accept_changes: bool) -> DistillResult:
        folder = self.output / "snapshots"
        snapshot = find_snapshot(folder, announce=self.say)
        if snapshot is not None:
            agree(
                self.output,
                snapshot,
                self.config,
                sources=self.sources,
                free=("snapshots", "data.workers", "data.prefetch"),
                accept_changes=accept_changes,
                say=self.say,
            )
        write_config(self.output, self.config)
        for line in self.job.begin(self._calibration()):
            self.say(line)
        first = 0
        if snapshot is not None:
            read_snapshot(snapshot, self._tensors())
            first = snapshot.position.step
            self.say(f"goes on after step {first:,} of {self.stage.steps:,}")
        done, quarantined = self._train(first)
        if self.stop.asked and done < self.stage.steps:
            self.say(f"stopped after step {done:,}: run the same command again to go on")
            return DistillResult(output=self.output, weights=(), steps=done, quarantined=quarantined)
        weights = self.job.finish(self.output, pictures=pictures(self.sources, self.data))
        return DistillResult(output=self.output, weights=tuple(weights), steps=done, quarantined=quarantined)

    def _calibration(self) -> list[Batch]:
        """A few batches that no step has: the same in every process, and after every restart."""
        count = -(-self.calibration // self.stage.batch_size)
        steps = range(self.stage.steps, self.stage.steps + count)
        loader = Loader(
            self.sources, stage=self.stage, seed=self.seed, data=self.data, steps=steps, rank=0, world_size=1
        )
        return [batch.to(self.device) for batch in loader] if count else []

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {k: v for one in self.job.optimizers.values() for k, v in training_tensors(self.job.model, one).items()}

    def _train(self, first: int) -> tuple[int, int]:
        """Steps done in all, and pictures that could not be read."""
        loader = Loader(
            self.sources, stage=self.stage, seed=self.seed, data=self.data, steps=range(first, self.stage.steps)
        )
        guards = {name: Guard(say=self.say) for name in self.job.optimizers}
        journal = Journal(self.output / "metrics.jsonl", step=first)
        recent: deque[float] = deque([time.perf_counter()], maxlen=50)
        done, quarantined = first, 0
        try:
            for batch in until_stopped(loader, self.stop, device=self.device):
                values = step_values(self.stage, done)
                reports = self.job.take(batch.to(self.device), values=values, step=done)
                done += 1
                recent.append(time.perf_counter())
                quarantined += loader.write_quarantine(self.output)
                self._note(journal, done, reports, values, seconds=(recent[-1] - recent[0]) / (len(recent) - 1))
                for name, report in reports.items():
                    guards[name].check(done, report)
                if done % self.snapshots.every == 0:
                    self._save(done, journal)
            if done > first:
                self._save(done, journal)
        finally:
            journal.close()
        return done, quarantined

    def _note(
        self, journal: Journal, done: int, reports: Mapping[str, StepReport], values: StepValues, *, seconds: float
    ) -> None:
        rate, B = 1 / max(seconds, 1e-9), self.stage.batch_size
        if done % self.log_every == 0 or done == self.stage.steps or not all(r.finite for r in reports.values()):
            journal.write(
                {
                    "step": done,
                    "images": done * B,
                    "images_per_second": round(rate * B, 3),
                    "values": asdict(values),
                    "students": {
                        name: {"losses": r.losses, "grad_norms": r.gradient_norms, "finite": r.finite}
                        | ({} if r.finite else {"suspects": r.suspects})
                        for name, r in reports.items()
                    },
                }
            )
        self.advance(
            DistillProgress(
                step=done,
                steps=self.stage.steps,
                images=B,
                losses={name: r.losses["total"] for name, r in reports.items()},
                images_per_second=rate * B,
                seconds_left=(self.stage.steps - done) / rate,
            )
        )

    def _save(self, done: int, journal: Journal) -> None:
        folder = self.output / "snapshots"
        if (folder / f"step-{done:08d}").exists():
            return
        journal.sync()
        position = Position(stage=0, step=done, total=done)
        write_snapshot(
            folder,
            self._tensors(),
            position=position,
            config=self.config,
            notes={"pictures": [len(source) for source in self.sources]},
        )
        prune_snapshots(folder, keep_last=self.snapshots.keep, keep_every=self.snapshots.keep_every)


def run_job(
    job: Job,
    *,
    config: dict[str, Any],
    stage: StageConfig,
    sources: Sequence[Source],
    data: DataConfig,
    snapshots: SnapshotConfig,
    seed: int,
    output: Path,
    device: torch.device,
    calibration: int = 0,
    log_every: int = 10,
    accept_changes: bool = False,
    say: Callable[[str], None] | None = None,
    advance: Callable[[DistillProgress], None] | None = None,
) -> DistillResult:
    """Take all steps of a run that are left, from its newest snapshot if there is one.

    On the CPU a run that was killed, at whatever moment, ends in the same weights bit for bit as one that never was.
    SIGINT and SIGTERM end it with a snapshot.

    Args:
        job: students, teachers and how a step is taken.
        config: of the run, as `densedino.config.to_dict` writes it.
        stage: steps, batch size, crops and schedules.
        sources: of pictures.
        data: workers, weights and the kind of mixture.
        snapshots: when, and how many are kept.
        seed: of the run.
        output: the run's folder.
        device: of students and teachers.
        calibration: images that `Job.begin` gets, besides those of the steps.
        log_every: steps between lines of metrics.jsonl.
        accept_changes: go on although the configuration is not that of the run so far.
        say: takes what there is to tell, by default to stderr; process 0 alone calls it.
        advance: takes what there is to show of every step; process 0 alone calls it.
    """
    if stage.batch_size % world_size():
        raise InputError(
            f"a batch of {stage.batch_size} pictures cannot be split over {world_size()} processes evenly."
        )
    with stop_on_signals() as stop:
        run = _Run(
            job=job,
            config=config,
            stage=stage,
            sources=sources,
            data=data,
            snapshots=snapshots,
            seed=seed,
            calibration=calibration,
            log_every=log_every,
            output=output,
            device=device,
            say=first_process(say or to_stderr),
            advance=first_process(advance),
            stop=stop,
        )
        return run.go(accept_changes=accept_changes)


def make_student(
    spec: ViTSpec | ConvNeXtSpec, *, stage: StageConfig, seed: int, number: int = 0
) -> VisionTransformer | ConvNeXt:
    """A student on the CPU as the stage begins: random by the seed and its number, or `stage.start`'s weights.

    Raises:
        InputError: weights of another architecture, or for other channels.
    """
    channels = len(stage.resolutions[0].crops.mean)
    if stage.start in ("random", "previous"):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(counted_seed("weights", seed=seed, index=number))
            return create_model(spec, in_chans=channels, device="cpu")
    named = stage.start in MODELS or stage.start in WEIGHTS
    backbone, card = load_weights(
        stage.start if named else None, weights=None if named else stage.start, dtype=torch.float32
    )
    if backbone.spec != spec or card.in_chans != channels:
        raise InputError(
            f"{stage.start!r} holds a {card.model} for {card.in_chans} channels; the student is a {spec.name} for"
            f" {channels}. Start from weights of the student's kind, or from 'random'."
        )
    return backbone


def write_student(
    backbone: nn.Module,
    path: Path,
    *,
    spec: ViTSpec | ConvNeXtSpec | None,
    stage: StageConfig,
    pictures: Sequence[tuple[str, int]],
    how: str,
    licence: tuple[str, str] = (OWN_LICENCE, ""),
) -> Path:
    """Write a student with its card; process 0 does.

    Args:
        backbone: the moving average.
        path: of the .safetensors file; what is there is replaced.
        spec: None, or one that is not in the table: the state dict is written as it is, not for `densedino.load`.
        stage: for the statistics of its input, and the steps.
        pictures: name and number of pictures of each source.
        how: the method and the teachers, in words.
        licence: name and address.
    """
    if rank() != 0:
        return path
    state = {name: value.detach().cpu().contiguous() for name, value in backbone.state_dict().items()}
    if spec is None or MODELS.get(spec.name) != spec:
        with atomic_path(path) as scratch:
            save_file(state, scratch)
        return path
    crops = stage.resolutions[0].crops
    card = WeightsCard(
        name=spec.name,
        model=spec.name,
        source="densedino distill",
        sha256="",
        mean=crops.mean,
        std=crops.std,
        in_chans=len(crops.mean),
        licence=licence[0],
        licence_url=licence[1],
        data=", ".join(f"{name} ({count:,} pictures)" for name, count in pictures),
        dialect="densedino",
        untrained=False,
        notes=(f"{how}, by densedino {densedino.__version__}: {stage.steps:,} steps of {stage.batch_size} images",),
    )
    write_weights(state, path, card=card)
    return path
