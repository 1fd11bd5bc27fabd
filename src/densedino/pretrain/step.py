"""Owns the training step: prepared crops, masks and a state in, exactly one optimizer step, a report out; no I/O."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

import torch

from densedino.distributed import all_reduce, world_size
from densedino.errors import InputError
from densedino.pretrain.gram import refresh
from densedino.pretrain.memory import keep_freed_memory
from densedino.pretrain.meters import demand_entropy
from densedino.pretrain.optim import clip_gradients, set_hyperparameters, update_ema
from densedino.pretrain.parallel import average_gradients, whole
from densedino.pretrain.passes import Passes, Precision, make_targets
from densedino.pretrain.schedules import scale_lr

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor, nn

    from densedino.pretrain.crops import Crops
    from densedino.pretrain.settings import StageConfig
    from densedino.pretrain.student_teacher import StudentTeacher

__all__ = ["Batch", "Learner", "StepReport", "StepValues", "finish_step", "step_values", "train_step"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """What a step, or a micro-batch of it, is made of: b images."""

    crops: Crops
    """Stacked: global [G, b, C, H, W], local [L, b, C, h, w], perhaps Gram crops [G, b, C, H', W']."""
    masks: Tensor
    """[G, b, N] bool, True where the student's patch is masked; N patches of a global crop, row by row."""
    sample_ids: tuple[str, ...]
    """Names of the b images, for reports."""
    places: range
    """Of the images in the global batch: what the draws inside the model are counted by."""

    def __post_init__(self) -> None:
        b = self.masks.shape[1]
        views = (self.crops.global_crops, self.crops.local_crops, self.crops.gram_crops)
        sizes = [len(self.sample_ids), len(self.places), *(x.shape[1] for x in views if x is not None and len(x))]
        if any(size != b for size in sizes) or len(self.masks) != len(self.crops.global_crops):
            raise InputError(
                f"a batch of {len(self.crops.global_crops)} global crops of {b} images has masks"
                f" {tuple(self.masks.shape)}, and crops, ids and places of {sizes} images. Stack them alike."
            )

    def __len__(self) -> int:
        return self.masks.shape[1]

    def split(self, size: int | None) -> list[Batch]:
        """Micro-batches of `size` images, the last perhaps smaller; None: the whole batch as one."""
        size = size or len(self)
        parts = [slice(start, start + size) for start in range(0, len(self), size)]
        return [
            Batch(
                crops=self.crops.map(operator.itemgetter((slice(None), part))),
                masks=self.masks[:, part],
                sample_ids=self.sample_ids[part],
                places=self.places[part],
            )
            for part in parts
        ]

    def to(self, device: torch.device | str) -> Batch:
        """The batch with its tensors on `device`."""
        crops = self.crops.map(lambda x: x.to(device, non_blocking=True))
        return replace(self, crops=crops, masks=self.masks.to(device, non_blocking=True))


@dataclass(frozen=True, kw_only=True)
class StepValues:
    """What the schedules say for one step."""

    lr: float
    """In effect: scaled for the batch size, before the multipliers of layers."""
    last_layer_lr: float
    """Of the prototypes: 0 while they are frozen."""
    weight_decay: float
    momentum: float
    """Of the EMA teacher."""
    teacher_temperature: float
    local_weight: float = 1.0
    gram_weight: float = 0.0
    frozen_backbone: bool = False
    """Only the heads learn."""


def step_values(stage: StageConfig, step: int) -> StepValues:
    """All schedules of a stage at its own `step`, counted from 0."""
    optimizer, gram = stage.optimizer, stage.losses.gram
    lr = scale_lr(optimizer.lr(step), batch_size=stage.batch_size, rule=optimizer.lr_scaling)
    return StepValues(
        lr=lr,
        last_layer_lr=0.0 if step < optimizer.last_layer_freeze_steps else lr,
        weight_decay=optimizer.weight_decay(step),
        momentum=optimizer.momentum(step),
        teacher_temperature=optimizer.teacher_temperature(step),
        local_weight=stage.losses.local_weight(step),
        gram_weight=0.0 if gram is None else gram.weight(step),
        frozen_backbone=step < stage.frozen_backbone_steps,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class StepReport:
    """What a step did."""

    losses: dict[str, float]
    """Over the global batch: the terms that count, each before its weight, and "total", their weighted sum. The DINO
    terms are shares of one mean over all crop pairs: 2/18 and 16/18 of the pairs with 2 global and 8 local crops."""
    gradient_norms: dict[str, float]
    """Before clipping, by part: backbone, dino_head, ibot_head."""
    finite: bool
    """False: a loss or gradient was not finite, on any process, and nothing was changed."""
    values: StepValues
    sample_ids: tuple[str, ...]
    """Of this process."""
    suspects: tuple[str, ...] = ()
    """If not finite: the samples of this process whose crops are not finite, or else those of the micro-batches whose
    loss is not."""
    gram_refreshed: bool = False
    prototype_entropy: dict[str, float] = field(default_factory=dict)
    """"dino" and "ibot": how evenly the teacher asked for prototypes before they were balanced, 0 to 1."""
    features: dict[str, Tensor]
    """"student_cls" and "teacher_cls", each [G, b, D] fp32 on the device: CLS of this process's global crops."""


def train_step(
    state: StudentTeacher,
    optimizer: torch.optim.Optimizer,
    batches: Batch | Sequence[Batch],
    *,
    stage: StageConfig,
    values: StepValues,
    seed: int,
    step: int,
    counted_by: int | None = None,
    precision: Precision = "fp32",
) -> StepReport:
    """Exactly one optimizer step on prepared crops and masks (DINOv3 §3.2, §4.2).

    In this order: the Gram teacher's refreshment, if due before this step; teacher targets over the whole global batch;
    the student's gradients, micro-batch after micro-batch; their mean over processes; clipping by part; AdamW; EMA.
    Where a loss or a gradient is not finite, neither parameters nor optimizer nor EMA change.

    Args:
        state: student, teacher, perhaps a Gram teacher; changed in place.
        optimizer: of `make_optimizer`; changed in place.
        batches: this process's images: one batch, or micro-batches that give the same step, as long as KoLeo's groups
            and Gram matrices over several images (`img_level=False`) do not cross them.
        stage: losses, drop path, RoPE, clip and Gram schedule are read.
        values: of this step, from `step_values`.
        seed: of the run, for stochastic depth and RoPE.
        step: of the stage.
        counted_by: what the draws are counted by, if not `step`: the step of the run, so that stages draw differently.
        precision: of backbones and heads; losses and weights are fp32.

    Example:
        >>> config = recipe("debug")                              # of densedino.recipes
        >>> stage, state = config.stages[0], StudentTeacher(config)
        >>> optimizer = make_optimizer(state.student, stage.optimizer, fidelity=config.fidelity)
        >>> # state.student.load_state_dict(…) and state.teacher.load_state_dict(…) take weights of your own
        >>> crops = Crops(global_crops=torch.randn(2, 16, 3, 32, 32), local_crops=torch.randn(8, 16, 3, 16, 16))
        >>> masks = torch.rand(2, 16, 4) > 0.5                    # 2 × 2 patches of 16 pixels
        >>> batch = Batch(crops=crops, masks=masks, sample_ids=("name",) * 16, places=range(16))
        >>> report = train_step(state, optimizer, batch, stage=stage, values=step_values(stage, 0), seed=0, step=0)
        >>> assert report.finite and report.losses["total"] > 0
    """
    keep_freed_memory()  # the next step takes as much again
    batches = [batches] if isinstance(batches, Batch) else list(batches)
    gram = stage.losses.gram
    if gram is not None and gram.source == "checkpoint" and state.gram_teacher is None:
        raise InputError(
            "the stage has a Gram teacher but the state has none. Begin the stage with"
            " densedino.pretrain.starting.begin_stage, or call state.set_gram_teacher(backbone)."
        )
    refreshed = gram is not None and refresh(state, gram, step=step)
    state.train()
    optimizer.zero_grad(set_to_none=True)
    targets = make_targets(
        state.teacher,
        batches,
        temperature=values.teacher_temperature,
        precision=precision,
        keep_patches=gram is not None and gram.source == "ema" and values.gram_weight > 0,
    )
    passes = Passes(
        student=state.student,
        stage=stage,
        values=values,
        seed=seed,
        step=step if counted_by is None else counted_by,
        precision=precision,
        anchor=state,
    )
    losses, cls = passes.run(batches, targets)
    report = finish_step(
        state.student, state.teacher, optimizer, batches, losses=losses, values=values, clip=stage.optimizer.clip
    )
    features = {"student_cls": cls, "teacher_cls": torch.cat([target.cls for target in targets], dim=1)}
    asked = {"dino": targets[0].dino, "ibot": targets[0].ibot}  # the bias is that of the whole batch
    entropy = {name: demand_entropy(part.bias) for name, part in asked.items() if len(part)}
    return replace(report, gram_refreshed=refreshed, features=features, prototype_entropy=entropy)


class Learner(Protocol):
    """What `finish_step` needs of a network: its parameters, and the parts that are clipped by themselves."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """All of them."""

    def parts(self) -> dict[str, nn.Module]:
        """By name; "backbone" is the one that `StepValues.frozen_backbone` freezes."""


def finish_step(
    student: Learner,
    teacher: Learner,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    *,
    losses: Sequence[dict[str, Tensor]],
    values: StepValues,
    clip: float,
) -> StepReport:
    """From gradients to a step done: mean over processes, clipping, AdamW and EMA; or nothing, if they are not finite.

    Args:
        student: has the gradients.
        teacher: the student's moving average.
        optimizer: of the student.
        batches: the micro-batches, for the report.
        losses: of each, from `Passes.run`.
        values: of this step.
        clip: largest gradient norm of a part.
    """
    average_gradients(student.parameters())
    norms = {name: whole(norm) for name, norm in clip_gradients(student.parts(), max_norm=clip).items()}
    shares = [len(batch) / sum(map(len, batches)) for batch in batches]
    table = torch.stack([torch.stack(list(loss.values())) * share for loss, share in zip(losses, shares, strict=True)])
    means = all_reduce(table.sum(0)) / world_size()
    finite = bool(all_reduce((~torch.isfinite(torch.stack([*means, *norms.values()]))).any().float(), op="max") == 0)
    if finite:
        set_hyperparameters(
            optimizer, lr=values.lr, weight_decay=values.weight_decay, last_layer_lr=values.last_layer_lr
        )
        optimizer.step()
        for part in student.parts().keys() - ({"backbone"} if values.frozen_backbone else set()):
            update_ema(teacher.parts()[part], student.parts()[part], momentum=values.momentum)
    optimizer.zero_grad(set_to_none=True)
    return StepReport(
        losses=dict(zip(losses[0], means.tolist(), strict=True)),
        gradient_norms={name: norm.item() for name, norm in norms.items()},
        finite=finite,
        values=values,
        sample_ids=tuple(name for batch in batches for name in batch.sample_ids),
        suspects=() if finite else _suspects(batches, losses),
        features={},
    )


def _suspects(batches: Sequence[Batch], losses: Sequence[dict[str, Tensor]]) -> tuple[str, ...]:
    broken = [
        name
        for batch in batches
        for name, fine in zip(batch.sample_ids, batch.crops.finite().tolist(), strict=True)
        if not fine
    ]
    if broken:
        return tuple(broken)
    bad = [batch for batch, loss in zip(batches, losses, strict=True) if not torch.isfinite(loss["total"])]
    return tuple(name for batch in bad or batches for name in batch.sample_ids)
