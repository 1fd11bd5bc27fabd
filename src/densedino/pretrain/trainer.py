"""Owns a run: stage after stage, step after step, from wherever it stands to one weights file; killed, it goes on.

RUN/config.json            the whole configuration
RUN/metrics.jsonl          a line every so many steps
RUN/snapshots/             the whole state, see `densedino.pretrain.snapshots`
RUN/report.html, looks/    what it learns, see `densedino.pretrain.monitor`
RUN/quarantine.jsonl       pictures that could not be read
RUN/model.safetensors      in the end: the teacher's backbone, which `densedino.load` takes
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from densedino.config import to_dict
from densedino.distributed import world_size
from densedino.pretrain.contradictions import validate
from densedino.pretrain.guard import Guard
from densedino.pretrain.journal import Journal
from densedino.pretrain.loading import Loader
from densedino.pretrain.monitor import Monitor
from densedino.pretrain.outcome import check_starts, origin_of, write_outcome
from densedino.pretrain.parallel import compile_blocks, processes, recompute_blocks, shard, whole
from densedino.pretrain.randomness import counted_seed
from densedino.pretrain.signals import Stop, stop_on_signals
from densedino.pretrain.sitting import agree, first_process, pictures, to_stderr, until_stopped, write_config
from densedino.pretrain.snapshots import (
    Position,
    Snapshot,
    find_snapshot,
    prune_snapshots,
    read_snapshot,
    training_tensors,
    write_snapshot,
)
from densedino.pretrain.sources import open_sources
from densedino.pretrain.starting import begin_stage
from densedino.pretrain.step import step_values, train_step
from densedino.pretrain.student_teacher import StudentTeacher, make_optimizer
from densedino.weights.card import WeightsCard

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence

    import torch

    from densedino.pretrain.settings import RunConfig, StageConfig
    from densedino.pretrain.sources import Source
    from densedino.pretrain.step import StepReport

__all__ = ["FREE_FIELDS", "Progress", "Result", "pretrain"]

FREE_FIELDS = (
    "snapshots",
    "monitor",
    "data.workers",
    "data.prefetch",
    "micro_batch_size",
    "activation_checkpointing",
    "compile",
)
"""What may differ when a run goes on: the mathematics is the same. The last three may change the last bits."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What there is to show after a step."""

    stage: str
    step: int
    """Of the stage, done."""
    steps: int
    total: int
    """Of the run, done."""
    total_steps: int
    images: int
    """Of this step, over all processes."""
    report: StepReport


@dataclass(frozen=True, kw_only=True)
class Result:
    """How a run ended, or where it was stopped."""

    output: Path
    weights: Path | None
    """The file for `densedino.load`; None if the run was stopped before its end."""
    steps: int
    """Of all stages, done in this and earlier sittings."""
    skipped: int
    """Steps of this sitting that were not finite and changed nothing."""
    quarantined: int
    """Pictures of this sitting that could not be read."""


def pretrain(
    config: RunConfig,
    *,
    output: str | os.PathLike[str],
    sources: Sequence[Source] | None = None,
    device: str = "auto",
    sharded: bool = False,
    accept_changes: bool = False,
    say: Callable[[str], None] | None = None,
    advance: Callable[[Progress], None] | None = None,
) -> Result:
    """Train, or go on where an earlier call stopped; called again with the same arguments after any interruption.

    On the CPU a run that was killed, at whatever moment, ends in the same weights bit for bit as one that never was.
    Under torchrun the processes share each batch. SIGINT and SIGTERM end a run with a snapshot.

    Args:
        config: the run; see `densedino.recipes`.
        output: the run's folder; made if it is not there.
        sources: of pictures, instead of `config.data.sources`.
        device: auto (a GPU if there is one), cpu, cuda, mps.
        sharded: with several processes, FSDP2 rather than a replica in each.
        accept_changes: go on although the configuration is not that of the run so far.
        say: takes what there is to tell, a line at a time; by default prints it to stderr. Process 0 alone calls it.
        advance: takes what there is to show of every step. Process 0 alone calls it.

    Raises:
        InputError: a configuration that contradicts itself, or is not that of the run in `output`.
        TrainingError: too many steps were not finite.
    """
    with processes(device) as where, stop_on_signals() as stop:
        validate(config, world_size=world_size())
        run = _Run(
            config=config,
            output=Path(output),
            sources=open_sources(config.data, stages=config.stages) if sources is None else tuple(sources),
            device=where,
            sharded=sharded and world_size() > 1,
            say=first_process(say or to_stderr),
            advance=first_process(advance),
            stop=stop,
        )
        return run.go(accept_changes=accept_changes)


@dataclass(kw_only=True, eq=False)
class _Run:
    """One sitting of a run, in one process."""

    config: RunConfig
    output: Path
    sources: tuple[Source, ...]
    device: torch.device
    sharded: bool
    say: Callable[[str], None]
    advance: Callable[[Progress], None]
    stop: Stop
    position: Position = Position(stage=0, step=0, total=0)  # noqa: RUF009 (frozen)
    found: Position | None = None
    """Of the snapshot that this sitting goes on from."""
    saved: Position | None = None
    """Of the last snapshot."""
    origin: WeightsCard | None = None
    """Of the weights that the run started from."""
    quarantined: int = 0
    looked: int | None = None
    """Step of the last look."""
    timed: tuple[int, float] = (0, 0.0)
    """Images, and the seconds that they took, since a line was logged."""
    guard: Guard = field(init=False)
    journal: Journal = field(init=False)
    monitor: Monitor = field(init=False)

    def go(self, *, accept_changes: bool) -> Result:
        """Train to the end, or until a signal."""
        snapshot = find_snapshot(self.output / "snapshots", announce=self.say)
        if snapshot is not None:
            self._take_up(snapshot, accept_changes=accept_changes)
        else:
            check_starts(self.config)
        write_config(self.output, to_dict(self.config))
        done = self.position.total
        self.guard = Guard(say=self.say, recent=snapshot.notes["skipped"] if snapshot else ())
        self.journal = Journal(self.output / "metrics.jsonl", step=done)
        self.monitor = Monitor(self.output, self.config, sources=self.sources, step=done, announce=self.say)
        state: StudentTeacher | None = None
        try:
            for index in range(self.position.stage, len(self.config.stages)):
                resumed = snapshot if snapshot is not None and snapshot.position.stage == index else None
                if resumed is None:
                    self.position = replace(self.position, stage=index, step=0)
                state, optimizer = self._enter(index, state, resumed=resumed)
                self._train(state, optimizer)
                self._save(state, optimizer)
                if self.stop.asked:
                    self.say(f"stopped after step {self.position.total:,}: run the same command again to go on")
                    return self._result(None)
            assert state is not None
            return self._result(self._finish(state))
        finally:
            self.journal.close()
            self.monitor.close()

    def _take_up(self, snapshot: Snapshot, *, accept_changes: bool) -> None:
        """Go on from a snapshot, if it is of this run."""
        agree(
            self.output,
            snapshot,
            to_dict(self.config),
            sources=self.sources,
            free=FREE_FIELDS,
            accept_changes=accept_changes,
            say=self.say,
        )
        self.position = self.found = self.saved = snapshot.position
        origin = snapshot.notes["origin"]
        self.origin = None if origin is None else WeightsCard.from_dict(origin)
        self.say(f"goes on after step {self.position.total:,} of {self._total_steps:,}")

    @property
    def _total_steps(self) -> int:
        return sum(stage.steps for stage in self.config.stages)

    def _enter(
        self, index: int, before: StudentTeacher | None, *, resumed: Snapshot | None
    ) -> tuple[StudentTeacher, torch.optim.Optimizer]:
        """State and optimizer with which a stage begins, or with which it was interrupted."""
        config, stage = self.config, self.config.stages[index]
        state = StudentTeacher(config, device=self.device)
        if before is not None:
            state.load_state_dict({k: whole(v) for k, v in before.state_dict().items() if "gram_teacher" not in k})
        if resumed is None:
            for line in begin_stage(state, config, stage=index):
                self.say(f"{stage.name}: {line}")
            self.origin = origin_of(stage.start) if stage.start != "previous" else self.origin
        elif stage.losses.gram is not None and stage.losses.gram.source == "checkpoint":
            state.set_gram_teacher(state.teacher.backbone)  # a place for the snapshot's
        if config.activation_checkpointing != "none":
            recompute_blocks(state.student.backbone, how=config.activation_checkpointing)
        if config.compile:
            compile_blocks(state.student.backbone)
        if self.sharded:
            gram = [] if state.gram_teacher is None else [state.gram_teacher]
            shard([*state.student.parts().values(), *state.teacher.parts().values(), *gram])
        optimizer = make_optimizer(state.student, stage.optimizer, fidelity=config.fidelity)
        if resumed is not None:
            read_snapshot(resumed, training_tensors(state, optimizer))
        return state, optimizer

    def _train(self, state: StudentTeacher, optimizer: torch.optim.Optimizer) -> None:
        """The rest of the stage that `position` is in, or less if a signal comes."""
        config, index = self.config, self.position.stage
        stage = config.stages[index]
        seed = counted_seed("stage", seed=config.seed, index=index)
        steps = range(self.position.step, stage.steps)
        loader = Loader(self.sources, stage=stage, seed=seed, data=config.data, steps=steps)
        self._look(state, stage)
        start = time.perf_counter()
        for batch in until_stopped(loader, self.stop, device=self.device):
            step = self.position.step
            report = train_step(
                state,
                optimizer,
                batch.to(self.device).split(config.micro_batch_size or len(batch)),
                stage=stage,
                values=step_values(stage, step),
                seed=seed,
                step=step,
                precision=config.precision,
            )
            self.position = replace(self.position, step=step + 1, total=self.position.total + 1)
            self.timed = (self.timed[0] + stage.batch_size, self.timed[1] + time.perf_counter() - start)
            self.quarantined += loader.write_quarantine(self.output)
            self._note(report, stage)
            if self.position.total % config.snapshots.every == 0:
                self._save(state, optimizer)
            self._look(state, stage)
            start = time.perf_counter()

    def _look(self, state: StudentTeacher, stage: StageConfig) -> None:
        total = self.position.total
        if self.monitor.is_due(total) and self.looked != total:
            self.looked = total
            self.monitor.look(total, state.teacher.backbone, stage=stage.name)

    def _note(self, report: StepReport, stage: StageConfig) -> None:
        """Log and show a step; stop the run if it is one too many that is not finite."""
        total, (images, seconds) = self.position.total, self.timed
        if not report.finite or total % self.config.monitor.log_every == 0 or total == self._total_steps:
            entry = {
                "step": total,
                "stage": stage.name,
                "stage_step": self.position.step,
                "images": self._images(),
                "epoch": round(self._images() / sum(map(len, self.sources)), 4),
                "finite": report.finite,
                "losses": report.losses,
                "prototype_entropy": report.prototype_entropy,
                "grad_norms": report.gradient_norms,
                "values": asdict(report.values),
                "images_per_second": round(images / seconds, 3),
            } | ({} if report.finite else {"suspects": report.suspects})
            self.timed = (0, 0.0)
            self.journal.write(entry)
            self.monitor.record(total, entry)
        self.advance(
            Progress(
                stage=stage.name,
                step=self.position.step,
                steps=stage.steps,
                total=total,
                total_steps=self._total_steps,
                images=stage.batch_size,
                report=report,
            )
        )
        self.guard.check(total, report)

    def _images(self) -> int:
        """Seen since the run began."""
        stages, position = self.config.stages, self.position
        before = sum(stage.steps * stage.batch_size for stage in stages[: position.stage])
        return before + position.step * stages[position.stage].batch_size

    def _save(self, state: StudentTeacher, optimizer: torch.optim.Optimizer) -> None:
        """Write a snapshot of where the run stands, if there is none."""
        if self.position == self.saved:
            return
        self.journal.sync()
        folder, kept = self.output / "snapshots", self.config.snapshots
        write_snapshot(
            folder,
            training_tensors(state, optimizer),
            position=self.position,
            config=to_dict(self.config),
            notes={
                "skipped": list(self.guard.recent),
                "pictures": [len(source) for source in self.sources],
                "origin": None if self.origin is None else self.origin.to_dict(),
            },
        )
        prune_snapshots(folder, keep_last=kept.keep, keep_every=kept.keep_every)
        self.saved = self.position

    def _finish(self, state: StudentTeacher) -> Path:
        """Write what the run was for, if it is not there."""
        path = self.output / "model.safetensors"
        if path.exists() and self.position == self.found:
            return path
        return write_outcome(
            state.teacher.backbone,
            path,
            config=self.config,
            pictures=pictures(self.sources, self.config.data),
            origin=self.origin,
        )

    def _result(self, weights: Path | None) -> Result:
        return Result(
            output=self.output,
            weights=weights,
            steps=self.position.total,
            skipped=self.guard.count,
            quarantined=self.quarantined,
        )
