"""Owns the recipes by which the paper's smaller models were distilled from its 7B teacher's prototypes.

Numbers: DINOv3 (arXiv 2508.10104), §5.2, and the public configurations. `teacher` is the folder of a run of
`densedino pretrain` that has the teacher with its heads, such as one of the recipe `vit7b16_highres`; the released
7B weights come without heads and teach by features instead (`densedino.pretrain.feature_distill`).
"""

from __future__ import annotations

import math

from densedino.models.rope import RopeAugment
from densedino.pretrain.crops import CropConfig
from densedino.pretrain.distill import DistillConfig
from densedino.pretrain.schedules import CosineSchedule, StagedSchedule, constant
from densedino.pretrain.settings import (
    HeadConfig,
    LossConfig,
    OptimizerConfig,
    Resolution,
    SnapshotConfig,
    StageConfig,
)
from densedino.weights.catalog import IMAGENET_STATS

__all__ = [
    "convnext_base_distill",
    "convnext_large_distill",
    "convnext_small_distill",
    "convnext_tiny_distill",
    "vit_distill",
]

_EPOCH = 1250
_DINO = HeadConfig(hidden_dim=8192, bottleneck_dim=512, num_prototypes=262144)  # the 7B teacher's
_IBOT = HeadConfig(hidden_dim=4096, bottleneck_dim=384, num_prototypes=98304)


def vit_distill(teacher: str) -> DistillConfig:
    """ViT-S, S+, B and L at once: 25 thousand steps of 1,920 images at 256/112 px.

    The public configuration is that of the last leg of a longer, unpublished run. It scales the learning rate for
    6 images on each of 296 GPUs, 1,776 of the 1,920; so does this one.
    """
    steps = 20 * _EPOCH
    lr = 5e-5 * 4 * math.sqrt(1776 / 1024)
    stage = StageConfig(
        name="distill",
        start="random",
        steps=steps,
        batch_size=1920,
        resolutions=(Resolution(crops=_crops(256, 112, stride=16, hflip=0.0)),),
        optimizer=OptimizerConfig(
            lr=StagedSchedule(start=0.0, peak=0.0, end=lr, cosine_steps=10 * _EPOCH),
            lr_scaling="none",
            weight_decay=constant(0.04),
            momentum=CosineSchedule(base=0.994, final=1.0, total_steps=steps),
            teacher_temperature=constant(0.07),
            betas=(0.9, 0.999),
            clip=3.0,
            layer_decay=0.99,
        ),
        losses=LossConfig(koleo_weight=0.1, koleo_distributed=False),
        rope=RopeAugment(rescale=2.0, per_block=True),
    )
    return DistillConfig(
        students=("vits16", "vits16plus", "vitb16", "vitl16"),
        teacher=teacher,
        teacher_model="vit7b16",
        stage=stage,
        dino_head=_DINO,
        ibot_head=_IBOT,
        precision="bf16",
        snapshots=SnapshotConfig(every=3750, keep=3),
    )


def convnext_tiny_distill(teacher: str) -> DistillConfig:
    """ConvNeXt-T; see `convnext_base_distill`."""
    return _convnext("convnext_tiny", teacher, lr=2e-4, weight_decay=0.04)


def convnext_small_distill(teacher: str) -> DistillConfig:
    """ConvNeXt-S; see `convnext_base_distill`."""
    return _convnext("convnext_small", teacher, lr=2e-4, weight_decay=0.04)


def convnext_base_distill(teacher: str) -> DistillConfig:
    """ConvNeXt-B: 625 thousand steps of 4,096 images at 512/224 px, which the teacher sees at 256/112."""
    return _convnext("convnext_base", teacher, lr=1e-4, weight_decay=0.02)


def convnext_large_distill(teacher: str) -> DistillConfig:
    """ConvNeXt-L; see `convnext_base_distill`."""
    return _convnext("convnext_large", teacher, lr=1e-4, weight_decay=0.04)


def _convnext(student: str, teacher: str, *, lr: float, weight_decay: float) -> DistillConfig:
    steps = 500 * _EPOCH
    stage = StageConfig(
        name="distill",
        start="random",
        steps=steps,
        batch_size=4096,
        resolutions=(Resolution(crops=_crops(512, 224, stride=32, hflip=0.5)),),
        optimizer=OptimizerConfig(
            lr=StagedSchedule(
                start=1e-6, peak=lr, end=1e-6, warmup_steps=80 * _EPOCH, cosine_steps=steps - 80 * _EPOCH
            ),
            weight_decay=StagedSchedule(start=weight_decay, peak=0.2, end=0.2, warmup_steps=steps),
            momentum=StagedSchedule(start=0.994, peak=1.0, end=1.0, warmup_steps=steps),
            teacher_temperature=StagedSchedule(start=0.04, peak=0.07, end=0.07, warmup_steps=120 * _EPOCH),
            last_layer_freeze_steps=_EPOCH,
            betas=(0.9, 0.999),
            clip=3.0,
            layer_decay=1.0,
        ),
        losses=LossConfig(koleo_weight=0.1, koleo_distributed=False),
    )
    return DistillConfig(
        students=(student,),
        teacher=teacher,
        teacher_model="vit7b16",
        stage=stage,
        dino_head=_DINO,
        ibot_head=_IBOT,
        student_dino_head=HeadConfig(hidden_dim=2048, bottleneck_dim=256, num_prototypes=_DINO.num_prototypes),
        student_ibot_head=HeadConfig(hidden_dim=2048, bottleneck_dim=256, num_prototypes=_IBOT.num_prototypes),
        precision="bf16",
        snapshots=SnapshotConfig(every=3750, keep=3),
    )


def _crops(global_size: int, local_size: int, *, stride: int, hflip: float) -> CropConfig:
    mean, std = IMAGENET_STATS
    return CropConfig(mean=mean, std=std, global_size=global_size, local_size=local_size, stride=stride, hflip=hflip)
