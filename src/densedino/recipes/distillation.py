"""Owns our recipes for distillation: from any teachers' features, or by the prototypes of a run of one's own."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from densedino.models.catalog import model_spec
from densedino.models.rope import RopeAugment
from densedino.pretrain.crops import CropConfig
from densedino.pretrain.distill import DistillConfig
from densedino.pretrain.distortions import Jitter
from densedino.pretrain.feature_run import FeatureDistillConfig
from densedino.pretrain.schedules import StagedSchedule, constant
from densedino.pretrain.settings import LossConfig, OptimizerConfig, Resolution, StageConfig
from densedino.weights.catalog import IMAGENET_STATS

if TYPE_CHECKING:
    from densedino.pretrain.feature_distill import TeacherConfig
    from densedino.pretrain.settings import RunConfig

__all__ = ["from_features", "from_run"]


def from_features(
    teachers: tuple[TeacherConfig, ...],
    *,
    model: str = "vitt16",
    size: int = 224,
    steps: int = 10_000,
    batch_size: int = 32,
) -> FeatureDistillConfig:
    """Headless distillation: one crop an image, a quarter to all of its area, and colours changed for the student only.

    Args:
        teachers: at least one.
        model: the student.
        size: pixels of its crops, a multiple of its stride; a third of the steps see crops half as large again.
        steps: of all.
        batch_size: images of a step.
    """
    stride = model_spec(model).stride
    crops = CropConfig(
        mean=IMAGENET_STATS[0],
        std=IMAGENET_STATS[1],
        global_size=size,
        num_global=1,
        num_local=0,
        global_scale=(0.25, 1.0),
        jitter=Jitter(brightness=0.3, contrast=0.3, saturation=0.3, hue=0.05),
        grayscale=0.1,
        solarize=0.0,
        stride=stride,
        gram_size=size,  # the teachers' crops: what the student sees, without the changes of colour
    )
    larger = round(size * 1.5 / stride) * stride
    stage = StageConfig(
        name="distill",
        steps=steps,
        batch_size=batch_size,
        resolutions=(
            Resolution(crops=crops, share=2),
            Resolution(crops=replace(crops, global_size=larger, gram_size=larger), share=1),
        ),
        optimizer=replace(_optimizer(steps), patch_embed_lr=1.0, momentum=constant(0.999 if steps > 2000 else 0.99)),
        rope=RopeAugment(rescale=1.4),
        start="random",
    )
    return FeatureDistillConfig(model=model, teachers=teachers, stage=stage)


def from_run(
    teacher: str, run: RunConfig, *, students: tuple[str, ...] = ("vitt16",), steps: int = 10_000, batch_size: int = 64
) -> DistillConfig:
    """Distillation by prototypes: crops, masks and heads of the teacher's last stage, and a schedule of its own.

    Args:
        teacher: folder of its run.
        run: its configuration.
        students: architectures, each once.
        steps: of all.
        batch_size: images of a step.
    """
    last, own = run.stages[-1], run.spec.stride
    made_for = max(own, *(model_spec(name).stride for name in students))
    stage = StageConfig(
        name="distill",
        steps=steps,
        batch_size=batch_size,
        resolutions=tuple(
            Resolution(crops=_at_stride(one.crops, own, made_for), share=one.share) for one in last.resolutions
        ),
        optimizer=_optimizer(steps),
        losses=LossConfig(koleo_weight=0.0),
        masks=last.masks,
        start="random",
    )
    return DistillConfig(
        students=students,
        teacher=teacher,
        teacher_model=run.model,
        stage=stage,
        dino_head=run.dino_head,
        ibot_head=run.ibot_head,
        precision=run.precision,
    )


def _optimizer(steps: int) -> OptimizerConfig:
    warmup = steps // 50
    return OptimizerConfig(
        lr=StagedSchedule(start=0.0, peak=5e-4, end=1e-6, warmup_steps=warmup, cosine_steps=steps - warmup),
        lr_scaling="none",
    )


def _at_stride(crops: CropConfig, own: int, made_for: int) -> CropConfig:
    """The same crops for another stride; without those of a Gram teacher."""
    return replace(
        crops,
        global_size=crops.global_size // own * made_for,
        local_size=crops.local_size // own * made_for,
        stride=made_for,
        gram_size=None,
    )
