"""Owns the recipes of the paper's models, with the values that the released ones were trained with.

Numbers: DINOv3 (arXiv 2508.10104), §3.2, §4.2, §5.1 and the public configurations. Batches are global; they were spread
over 256 GPUs (7B) and 32 (ViT-L). What differs here, on purpose: fp8 is not offered (bf16 is), and a ViT's key bias is
always zero, which changes nothing that softmax sees.
"""

from __future__ import annotations

from dataclasses import replace

from densedino.models.rope import RopeAugment
from densedino.pretrain.crops import CropConfig
from densedino.pretrain.schedules import CosineSchedule, StagedSchedule, constant
from densedino.pretrain.settings import (
    GramConfig,
    HeadConfig,
    LossConfig,
    OptimizerConfig,
    Resolution,
    RunConfig,
    SnapshotConfig,
    StageConfig,
)
from densedino.weights.catalog import IMAGENET_STATS

__all__ = ["vit7b16_gram", "vit7b16_highres", "vit7b16_pretrain", "vitl16_in1k"]

_EPOCH = 1000  # steps of an "epoch" of the 7B recipes


def vit7b16_pretrain() -> RunConfig:
    """7B, 1.0 M steps of 4,096 images at 256/112 px, learning rate constant after a warm-up of 100 k steps."""
    stage = StageConfig(
        name="pretrain",
        start="random",
        steps=1000 * _EPOCH,
        batch_size=4096,
        resolutions=(Resolution(crops=_crops(256, 112)),),
        optimizer=OptimizerConfig(
            lr=StagedSchedule(start=0.0, peak=5e-5, end=5e-5, warmup_steps=100 * _EPOCH),
            weight_decay=constant(0.04),
            momentum=constant(0.994),
            teacher_temperature=StagedSchedule(start=0.04, peak=0.07, end=0.07, warmup_steps=100 * _EPOCH),
            last_layer_freeze_steps=5 * _EPOCH,
            betas=(0.9, 0.99),
            clip=30.0,
            layer_decay=0.98,
        ),
        losses=LossConfig(koleo_weight=0.1, koleo_distributed=False),
        drop_path=0.4,
        rope=RopeAugment(rescale=2.0, per_block=True),
    )
    return RunConfig(
        model="vit7b16",
        dino_head=HeadConfig(hidden_dim=8192, bottleneck_dim=512, num_prototypes=262144),
        ibot_head=HeadConfig(hidden_dim=4096, bottleneck_dim=384, num_prototypes=98304),
        stages=(stage,),
        precision="bf16",
        snapshots=SnapshotConfig(every=1000, keep=3, keep_every=50_000),
        activation_checkpointing="selective",
    )


def vit7b16_gram() -> RunConfig:
    """The run of `vit7b16_pretrain` and a second stage of 200 k steps with Gram anchoring.

    The public configuration is one run of 1.2 M steps, resumed from the first one's folder, with everything laid out
    from its step 0. Here the stage counts for itself: its step 0 is that run's step 1.0 M. So learning rate, teacher
    temperature and last layer are past their warm-ups; the Gram weight rises to 2 and the local loss's falls to 0.5 in
    the first 1 k steps; and the Gram teacher, at first the teacher of the stage's start, is refreshed before steps
    10 k, 20 k and 30 k (1.01 M, 1.02 M, 1.03 M).
    """
    before = vit7b16_pretrain()
    (pretrain,) = before.stages
    stage = replace(
        pretrain,
        name="gram",
        start="previous",
        steps=200 * _EPOCH,
        resolutions=(Resolution(crops=_crops(256, 112, gram=512)),),
        optimizer=replace(
            pretrain.optimizer,
            lr=constant(3e-5),
            momentum=constant(0.999),
            teacher_temperature=constant(0.07),
            last_layer_freeze_steps=0,
        ),
        losses=LossConfig(
            koleo_weight=0.1,
            koleo_distributed=False,
            local_weight=StagedSchedule(start=1.0, peak=1.0, end=0.5, cosine_steps=1000),
            gram=GramConfig(
                weight=StagedSchedule(start=0.0, peak=0.0, end=2.0, cosine_steps=1000),
                first_update=10_000,
                update_every=10_000,
                max_updates=3,
            ),
        ),
    )
    return replace(before, stages=(pretrain, stage), activation_checkpointing="full")


def vit7b16_highres() -> RunConfig:
    """The run of `vit7b16_gram` and a third stage of 30 k steps of 2,048 images, at five resolutions drawn by step.

    Student and Gram teacher start from the second stage's teacher; the Gram teacher is not refreshed. The public
    configuration has local crops of 168 px, 10.5 patches, where it has 160 here: its patch embedding leaves the last
    eight rows and columns out, and ours refuses such sizes.
    """
    before = vit7b16_gram()
    gram = before.stages[-1]
    sizes = (  # global, local and Gram crops, share of the steps
        (512, 112, 768, 0.3),
        (768, 112, 1152, 0.3),
        (768, 160, 1152, 0.3),
        (768, 224, 1152, 0.05),
        (768, 336, 1152, 0.05),
    )
    stage = replace(
        gram,
        name="highres",
        steps=30 * _EPOCH,
        batch_size=2048,
        resolutions=tuple(Resolution(crops=_crops(g, local, gram=t), share=share) for g, local, t, share in sizes),
        optimizer=replace(
            gram.optimizer, lr=StagedSchedule(start=0.0, peak=0.0, end=1.25e-5, cosine_steps=10 * _EPOCH)
        ),
        losses=LossConfig(
            koleo_weight=0.1,
            koleo_distributed=True,
            koleo_group_size=16,
            koleo_topk=1,
            local_weight=constant(0.5),
            gram=GramConfig(weight=constant(1.5)),
        ),
    )
    return replace(
        before, stages=(*before.stages, stage), snapshots=SnapshotConfig(every=250, keep=3, keep_every=50_000)
    )


def vitl16_in1k() -> RunConfig:
    """ViT-L on ImageNet-1k: 100 epochs of 1,250 steps of 2,048 images at 224/96 px, in the schedules of DINOv2."""
    epoch, epochs = 1250, 100
    steps = epoch * epochs
    stage = StageConfig(
        name="pretrain",
        start="random",
        steps=steps,
        batch_size=2048,
        resolutions=(Resolution(crops=replace(_crops(224, 96), hflip=0.5)),),
        optimizer=OptimizerConfig(
            lr=CosineSchedule(base=1e-3, final=1e-6, total_steps=steps, warmup_steps=10 * epoch),
            weight_decay=CosineSchedule(base=0.04, final=0.4, total_steps=steps),
            momentum=CosineSchedule(base=0.992, final=1.0, total_steps=steps),
            teacher_temperature=CosineSchedule(
                base=0.07, final=0.07, total_steps=steps, warmup_steps=30 * epoch, warmup_start=0.04
            ),
            last_layer_freeze_steps=epoch,
            betas=(0.9, 0.999),
            clip=3.0,
            layer_decay=0.9,
        ),
        losses=LossConfig(koleo_weight=0.1, koleo_distributed=False),
        drop_path=0.3,
    )
    return RunConfig(
        model="vitl16_plain",
        dino_head=HeadConfig(hidden_dim=2048, bottleneck_dim=256, num_prototypes=65536),
        ibot_head=HeadConfig(hidden_dim=2048, bottleneck_dim=256, num_prototypes=65536),
        stages=(stage,),
        precision="bf16",
        snapshots=SnapshotConfig(every=3750, keep=3),
    )


def _crops(global_size: int, local_size: int, *, gram: int | None = None) -> CropConfig:
    mean, std = IMAGENET_STATS
    return CropConfig(mean=mean, std=std, global_size=global_size, local_size=local_size, gram_size=gram, hflip=0.0)
