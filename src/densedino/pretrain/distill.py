"""Owns distillation by prototypes: a frozen teacher with its heads sets the targets of several students at once.

As DINOv3 §5.2: the students' losses are those of pretraining, with the frozen teacher in the EMA teacher's place and
nothing masked; each student has heads of its own and a moving average, which is what it ends as. The teacher looks once
at each crop, whoever learns. Every network sees the same crops at a size that gives it the same grid: a ConvNeXt, with
32 pixels a token, at twice the size of a ViT's; a larger crop is scaled down for the teacher, not up.
"""

# ruff: noqa: RUF009 (defaults are frozen)
from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from densedino.config import to_dict
from densedino.errors import InputError
from densedino.models.catalog import ConvNeXtSpec, ViTSpec, model_spec
from densedino.pretrain import Fidelity  # noqa: TC001 (read at run time)
from densedino.pretrain.crops import Crops
from densedino.pretrain.distill_run import DistillResult, make_student, run_job, write_student
from densedino.pretrain.parallel import processes
from densedino.pretrain.passes import Passes, make_targets
from densedino.pretrain.randomness import counted_seed
from densedino.pretrain.settings import DataConfig, HeadConfig, SnapshotConfig, StageConfig
from densedino.pretrain.snapshots import find_snapshot
from densedino.pretrain.sources import open_sources
from densedino.pretrain.step import finish_step
from densedino.pretrain.student_teacher import Network, make_optimizer

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping, Sequence

    from densedino.pretrain.distill_run import DistillProgress
    from densedino.pretrain.sources import Source
    from densedino.pretrain.step import Batch, StepReport, StepValues

__all__ = ["DistillConfig", "DistillJob", "Students", "at_stride", "distill", "distill_step", "read_teacher"]


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """A whole run."""

    students: tuple[str, ...]
    """Architectures of the table, each once."""
    teacher: str
    """Folder of a run of `densedino pretrain`, whose newest snapshot has the teacher with its heads."""
    teacher_model: str | ViTSpec | ConvNeXtSpec
    stage: StageConfig
    """Crops at the size that the largest stride needs: `crops.stride` is that stride. Masks say at which patches
    iBOT's term is taken; the students see whole crops. No Gram anchoring, as its teacher is the teacher."""
    dino_head: HeadConfig = HeadConfig()
    """The teacher's. Students have as many prototypes, but their own."""
    ibot_head: HeadConfig = HeadConfig()
    student_dino_head: HeadConfig | None = None
    """The students'; None: like the teacher's."""
    student_ibot_head: HeadConfig | None = None
    seed: int = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    fidelity: Fidelity = "released"
    micro_batch_size: int | None = None
    data: DataConfig = DataConfig()
    snapshots: SnapshotConfig = SnapshotConfig()
    log_every: int = 10

    def __post_init__(self) -> None:
        if not self.students or len(set(self.students)) < len(self.students):
            raise InputError(f"students are {self.students}; name one or several architectures, each once.")
        if self.stage.losses.gram is not None:
            raise InputError("Gram anchoring holds a student to its own past; in distillation set losses.gram=None.")
        strides = {model_spec(name).stride for name in self.students} | {self.teacher_spec.stride}
        for resolution in self.stage.resolutions:
            if resolution.crops.stride != max(strides):
                raise InputError(
                    f"crops.stride is {resolution.crops.stride}, but these networks have strides {sorted(strides)}: set"
                    f" it to {max(strides)}, and the sizes of the crops to multiples of it."
                )

    @property
    def teacher_spec(self) -> ViTSpec | ConvNeXtSpec:
        """The teacher's row of the table, or the specification given."""
        return model_spec(self.teacher_model) if isinstance(self.teacher_model, str) else self.teacher_model


def at_stride(batch: Batch, *, stride: int, made_for: int) -> Batch:
    """The same crops at the size that gives a network of `stride` the grid which they give one of `made_for`."""
    if stride == made_for:
        return batch

    def scaled(crops: Tensor) -> Tensor:
        if not len(crops):
            return crops
        size = [side * stride // made_for for side in crops.shape[-2:]]
        flat = F.interpolate(crops.flatten(0, 1), size=size, mode="bicubic", antialias=True)
        return flat.unflatten(0, crops.shape[:2])

    crops = Crops(global_crops=scaled(batch.crops.global_crops), local_crops=scaled(batch.crops.local_crops))
    return replace(batch, crops=crops)


class Students(nn.Module):
    """Students and their moving averages, by name; and the frozen teacher, which is no part of the state dict.

    Args:
        students: networks with heads.
        teacher: with heads of as many prototypes.
    """

    def __init__(self, students: Mapping[str, Network], teacher: Network) -> None:
        super().__init__()
        for name, student in students.items():
            for head in ("dino_head", "ibot_head"):
                ours, theirs = (len(getattr(one, head).last_layer.weight) for one in (student, teacher))
                if ours != theirs:
                    raise InputError(
                        f"{head} of student {name!r} has {ours:,} prototypes and the teacher's {theirs:,}; targets are"
                        " over the teacher's. Give the student as many."
                    )
        self.students = nn.ModuleDict(students)
        self.averages = nn.ModuleDict(
            {name: copy.deepcopy(one).requires_grad_(False).eval() for name, one in students.items()}
        )
        self._teacher = [teacher.requires_grad_(False).eval()]  # in a list: it belongs to no snapshot

    @property
    def teacher(self) -> Network:
        """Frozen."""
        return self._teacher[0]

    def pair(self, name: str) -> tuple[Network, Network]:
        """A student and its moving average."""
        student, average = self.students[name], self.averages[name]
        assert isinstance(student, Network)
        assert isinstance(average, Network)
        return student, average


def distill_step(
    state: Students,
    optimizers: Mapping[str, torch.optim.Optimizer],
    batches: Sequence[Batch],
    *,
    stage: StageConfig,
    values: StepValues,
    seed: int,
    step: int,
    made_for: int,
    precision: Literal["fp32", "bf16"] = "fp32",
) -> dict[str, StepReport]:
    """Exactly one optimizer step of every student on prepared crops and masks; the teacher looks at them once.

    A student whose loss or gradient is not finite stays as it is; the others go on.

    Args:
        state: changed in place.
        optimizers: of each student.
        batches: micro-batches of the step.
        stage: losses, stochastic depth, RoPE and clip are read.
        values: of this step.
        seed: of the run, for stochastic depth and RoPE.
        step: of the run.
        made_for: the stride that crops and masks were made for, the largest of all networks'.
        precision: of forward passes; losses and weights are fp32.
    """
    shown = [at_stride(batch, stride=state.teacher.backbone.stride, made_for=made_for) for batch in batches]
    targets = make_targets(state.teacher, shown, temperature=values.teacher_temperature, precision=precision)
    reports = {}
    for name in state.students:
        student, average = state.pair(name)
        student.train()
        optimizers[name].zero_grad(set_to_none=True)
        passes = Passes(
            student=student, stage=stage, values=values, seed=seed, step=step, precision=precision, masked=False
        )
        own = [at_stride(batch, stride=student.backbone.stride, made_for=made_for) for batch in batches]
        losses, _ = passes.run(own, targets)
        reports[name] = finish_step(
            student, average, optimizers[name], own, losses=losses, values=values, clip=stage.optimizer.clip
        )
    return reports


def read_teacher(config: DistillConfig, *, say: Callable[[str], None] = print) -> Network:
    """The EMA teacher with its heads, from the newest snapshot of a run.

    Raises:
        InputError: no such run, or another model or heads.
    """
    from safetensors import safe_open

    folder = Path(config.teacher)
    snapshot = find_snapshot(folder / "snapshots" if (folder / "snapshots").is_dir() else folder, announce=say)
    if snapshot is None or not (snapshot.path / "model.safetensors").is_file():
        raise InputError(
            f"{config.teacher!r} has no snapshot with a teacher and its heads. Give the folder of a run of densedino"
            " pretrain (not sharded); weights without heads teach by features: densedino.pretrain.feature_run."
        )
    teacher = _network(config.teacher_spec, replace(config, student_dino_head=None, student_ibot_head=None), seed=0)
    with safe_open(snapshot.path / "model.safetensors", framework="pt") as file:
        prefix = "model.teacher."
        state = {key.removeprefix(prefix): file.get_tensor(key) for key in file.keys() if key.startswith(prefix)}  # noqa: SIM118
    ours = {key: tuple(value.shape) for key, value in teacher.state_dict().items()}
    theirs = {key: tuple(value.shape) for key, value in state.items()}
    if ours != theirs:
        wrong = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
        raise InputError(
            f"the teacher in {snapshot.path} is not a {config.teacher_spec.name} with these heads: {wrong[0]} is"
            f" {theirs.get(wrong[0], 'absent')} there and {ours.get(wrong[0], 'absent')} here. Set teacher_model,"
            " dino_head and ibot_head to those of the run's config.json."
        )
    teacher.load_state_dict(state)
    return teacher


class DistillJob:
    """Students, optimizers and a teacher.

    Args:
        config: of the run.
        teacher: with its heads.
        device: of all.
    """

    def __init__(self, config: DistillConfig, teacher: Network, *, device: torch.device | str = "cpu") -> None:
        self.config = config
        students = {
            name: _network(model_spec(name), config, seed=counted_seed("student", seed=config.seed, index=number))
            for number, name in enumerate(config.students)
        }
        for number, (name, network) in enumerate(students.items()):
            start = make_student(model_spec(name), stage=config.stage, seed=config.seed, number=number)
            network.backbone.load_state_dict(start.state_dict())
        self.model = Students({name: one.to(device) for name, one in students.items()}, teacher.to(device))
        self.optimizers = {
            name: make_optimizer(self.model.pair(name)[0], config.stage.optimizer, fidelity=config.fidelity)
            for name in students
        }

    def begin(self, batches: Sequence[Batch]) -> list[str]:
        """Nothing is calibrated."""
        del batches
        return [
            f"teacher {self.config.teacher_spec.name} of {self.config.teacher}, {', '.join(self.config.students)} learn"
        ]

    def take(self, batch: Batch, *, values: StepValues, step: int) -> Mapping[str, StepReport]:
        """One step of each student."""
        config = self.config
        return distill_step(
            self.model,
            self.optimizers,
            batch.split(config.micro_batch_size),
            stage=config.stage,
            values=values,
            seed=config.seed,
            step=step,
            made_for=config.stage.resolutions[0].crops.stride,
            precision=config.precision,
        )

    def finish(self, folder: Path, *, pictures: Sequence[tuple[str, int]]) -> list[Path]:
        """Write each student's moving average."""
        how = f"distillation by prototypes from {self.config.teacher_spec.name} of {self.config.teacher}"
        return [
            write_student(
                self.model.pair(name)[1].backbone,
                folder / f"{name}.safetensors",
                spec=model_spec(name),
                stage=self.config.stage,
                pictures=pictures,
                how=how,
            )
            for name in self.config.students
        ]


def distill(
    config: DistillConfig,
    *,
    output: str | os.PathLike[str],
    sources: Sequence[Source] | None = None,
    teacher: Network | None = None,
    device: str = "auto",
    accept_changes: bool = False,
    say: Callable[[str], None] | None = None,
    advance: Callable[[DistillProgress], None] | None = None,
) -> DistillResult:
    """Distil, or go on where an earlier call stopped; called again with the same arguments after any interruption.

    Args:
        config: the run.
        output: its folder; made if it is not there.
        sources: of pictures, instead of `config.data.sources`.
        teacher: instead of reading `config.teacher`.
        device: auto (a GPU if there is one), cpu, cuda, mps.
        accept_changes: go on although the configuration is not that of the run so far.
        say: takes what there is to tell, a line at a time; by default prints it to stderr.
        advance: takes what there is to show of every step.

    Raises:
        InputError: a configuration that contradicts itself, or is not that of the run in `output`.
        TrainingError: too many steps were not finite.
    """
    with processes(device) as where:
        opened = open_sources(config.data, stages=[config.stage]) if sources is None else sources
        job = DistillJob(config, teacher or read_teacher(config, say=say or print), device=where)
        return run_job(
            job,
            config=to_dict(config),
            stage=config.stage,
            sources=opened,
            data=config.data,
            snapshots=config.snapshots,
            seed=config.seed,
            output=Path(output),
            device=where,
            log_every=config.log_every,
            accept_changes=accept_changes,
            say=say,
            advance=advance,
        )


def _network(spec: ViTSpec | ConvNeXtSpec, config: DistillConfig, *, seed: int) -> Network:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Network(
            spec,
            dino_head=config.student_dino_head or config.dino_head,
            ibot_head=config.student_ibot_head or config.ibot_head,
            in_chans=len(config.stage.resolutions[0].crops.mean),
            device="cpu",
        )
