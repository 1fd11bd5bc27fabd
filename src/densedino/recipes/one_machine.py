"""Owns our recipes for one machine: three stages for ten thousand to a million images, and going on from weights.

The course is the paper's (arXiv 2508.10104), shortened: pretraining at low resolution with all schedules in steps of
the stage itself, then Gram anchoring with a teacher that sees twice the resolution, then a short adaptation to higher
resolutions. Fewer images want fewer prototypes and more epochs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from densedino.models.rope import RopeAugment
from densedino.pretrain.crops import CropConfig
from densedino.pretrain.schedules import CosineSchedule, StagedSchedule, constant
from densedino.pretrain.settings import (
    GramConfig,
    HeadConfig,
    LossConfig,
    MaskConfig,
    OptimizerConfig,
    Resolution,
    RunConfig,
    SnapshotConfig,
    StageConfig,
)
from densedino.weights.catalog import DEFAULT_WEIGHTS, IMAGENET_STATS

__all__ = [
    "debug",
    "going_on",
    "three_stages",
    "vitb16_continue",
    "vitb16_large",
    "vitb16_medium",
    "vitb16_small",
    "vitl16_continue",
    "vits16_continue",
    "vits16_large",
    "vits16_medium",
    "vits16_small",
    "vitt16_continue",
    "vitt16_large",
    "vitt16_medium",
    "vitt16_small",
]


@dataclass(frozen=True, kw_only=True)
class Scale:
    """What goes with an amount of data."""

    images: int
    epochs: int
    """Of pretraining; Gram anchoring takes a tenth of its steps more, high resolution a twentieth."""
    batch_size: int
    num_prototypes: int
    size: tuple[int, int]
    """Global and local crops of the first two stages, pixels."""
    highres: tuple[tuple[int, int, float], ...]
    """Global and local crops of the last stage, and the share of each."""

    @property
    def steps(self) -> int:
        """Of pretraining."""
        return self.images * self.epochs // self.batch_size


SMALL = Scale(
    images=10_000,
    epochs=200,
    batch_size=128,
    num_prototypes=8192,
    size=(128, 64),
    highres=((224, 64, 0.4), (224, 96, 0.4), (256, 112, 0.2)),
)
MEDIUM = Scale(
    images=100_000,
    epochs=100,
    batch_size=256,
    num_prototypes=16384,
    size=(224, 96),
    highres=((320, 96, 0.4), (384, 112, 0.4), (384, 160, 0.2)),
)
LARGE = Scale(
    images=1_000_000,
    epochs=60,
    batch_size=512,
    num_prototypes=65536,
    size=(224, 96),
    highres=((384, 112, 0.4), (512, 112, 0.4), (512, 160, 0.2)),
)


def three_stages(model: str, scale: Scale, *, drop_path: float) -> RunConfig:
    """Pretraining, Gram anchoring and high resolution for `model`, from random weights."""
    pretrain = _pretrain(scale, drop_path=drop_path)
    gram = _gram(pretrain, scale)
    head = HeadConfig(num_prototypes=scale.num_prototypes)
    return RunConfig(
        model=model,
        dino_head=head,
        ibot_head=head,
        stages=(pretrain, gram, _highres(gram, scale)),
        precision="bf16",
        snapshots=SnapshotConfig(every=max(100, scale.steps // 100)),
    )


def vitt16_small() -> RunConfig:
    """ViT-Ti/16, 10 thousand images."""
    return three_stages("vitt16", SMALL, drop_path=0.0)


def vitt16_medium() -> RunConfig:
    """ViT-Ti/16, 100 thousand images."""
    return three_stages("vitt16", MEDIUM, drop_path=0.0)


def vitt16_large() -> RunConfig:
    """ViT-Ti/16, a million images."""
    return three_stages("vitt16", LARGE, drop_path=0.0)


def vits16_small() -> RunConfig:
    """ViT-S/16, 10 thousand images."""
    return three_stages("vits16", SMALL, drop_path=0.1)


def vits16_medium() -> RunConfig:
    """ViT-S/16, 100 thousand images."""
    return three_stages("vits16", MEDIUM, drop_path=0.1)


def vits16_large() -> RunConfig:
    """ViT-S/16, a million images."""
    return three_stages("vits16", LARGE, drop_path=0.1)


def vitb16_small() -> RunConfig:
    """ViT-B/16, 10 thousand images."""
    return three_stages("vitb16", SMALL, drop_path=0.2)


def vitb16_medium() -> RunConfig:
    """ViT-B/16, 100 thousand images."""
    return three_stages("vitb16", MEDIUM, drop_path=0.2)


def vitb16_large() -> RunConfig:
    """ViT-B/16, a million images."""
    return three_stages("vitb16", LARGE, drop_path=0.2)


def debug() -> RunConfig:
    """All three stages of a tiny model: seconds on a CPU, on any images."""
    scale = Scale(
        images=64,
        epochs=10,
        batch_size=16,
        num_prototypes=64,
        size=(32, 16),
        highres=((48, 16, 0.5), (64, 32, 0.5)),
    )
    run = three_stages("debug_vit", scale, drop_path=0.1)
    head = HeadConfig(hidden_dim=64, bottleneck_dim=32, num_prototypes=64)
    stages = tuple(
        replace(stage, steps=steps) if number else stage
        for number, (stage, steps) in enumerate(zip(run.stages, (40, 20, 20), strict=True))
    )
    return replace(
        run, stages=stages, dino_head=head, ibot_head=head, precision="fp32", snapshots=SnapshotConfig(every=20)
    )


def going_on(model: str, weights: str, *, batch_size: int = 64, steps: int = 5000) -> RunConfig:
    """Train `model` on with other images, from `weights` without heads.

    First fresh heads on the frozen backbone, for a fifth of the steps; then everything, at a low learning rate that
    is lower still in early layers, held to the patch similarities of the start by Gram anchoring.
    """
    warm = steps // 5
    heads = StageConfig(
        name="heads",
        start=weights,
        steps=warm,
        batch_size=batch_size,
        frozen_backbone_steps=warm,
        resolutions=(Resolution(crops=_crops(224, 96)),),
        optimizer=OptimizerConfig(
            lr=StagedSchedule(start=0.0, peak=5e-4, end=5e-4, warmup_steps=warm // 10),
            momentum=constant(0.99),
            teacher_temperature=StagedSchedule(start=0.04, peak=0.07, end=0.07, warmup_steps=warm),
        ),
        losses=_losses(),
    )
    adapt = replace(
        heads,
        name="adapt",
        start="previous",
        steps=steps,
        frozen_backbone_steps=0,
        optimizer=OptimizerConfig(
            lr=CosineSchedule(base=5e-5, final=1e-6, total_steps=steps, warmup_steps=steps // 10),
            momentum=constant(0.999),
            layer_decay=0.8,
        ),
        losses=replace(_losses(), gram=GramConfig(weight=constant(1.0))),
        rope=RopeAugment(rescale=2.0, per_block=True),
    )
    head = HeadConfig(num_prototypes=16384)
    return RunConfig(
        model=model,
        dino_head=head,
        ibot_head=head,
        stages=(heads, adapt),
        precision="bf16",
        snapshots=SnapshotConfig(every=250),
    )


def vitt16_continue() -> RunConfig:
    """From the weights that come with the package."""
    return going_on("vitt16", DEFAULT_WEIGHTS)


def vits16_continue() -> RunConfig:
    """From the released ViT-S/16."""
    return going_on("vits16", "vits16-lvd1689m")


def vitb16_continue() -> RunConfig:
    """From the released ViT-B/16."""
    return going_on("vitb16", "vitb16-lvd1689m")


def vitl16_continue() -> RunConfig:
    """From the released ViT-L/16."""
    return going_on("vitl16", "vitl16-lvd1689m")


def _pretrain(scale: Scale, *, drop_path: float) -> StageConfig:
    steps = scale.steps
    return StageConfig(
        name="pretrain",
        start="random",
        steps=steps,
        batch_size=scale.batch_size,
        resolutions=(Resolution(crops=_crops(*scale.size)),),
        optimizer=OptimizerConfig(
            lr=CosineSchedule(base=5e-4, final=1e-6, total_steps=steps, warmup_steps=steps // 10),
            weight_decay=CosineSchedule(base=0.04, final=0.2, total_steps=steps),
            momentum=CosineSchedule(base=0.992, final=1.0, total_steps=steps),
            teacher_temperature=StagedSchedule(start=0.04, peak=0.07, end=0.07, warmup_steps=steps * 3 // 10),
            last_layer_freeze_steps=steps // 100,
            layer_decay=0.9,
        ),
        losses=_losses(),
        masks=MaskConfig(),
        drop_path=drop_path,
        rope=RopeAugment(rescale=2.0, per_block=True),
    )


def _gram(pretrain: StageConfig, scale: Scale) -> StageConfig:
    steps = max(20, scale.steps // 10)
    soon = steps // 20
    return replace(
        pretrain,
        name="gram",
        start="previous",
        steps=steps,
        resolutions=(Resolution(crops=_crops(*scale.size, gram=2 * scale.size[0])),),
        optimizer=OptimizerConfig(
            lr=StagedSchedule(start=0.0, peak=5e-5, end=1e-6, warmup_steps=soon, cosine_steps=steps - soon),
            weight_decay=constant(0.2),
            momentum=constant(0.999),
            layer_decay=0.9,
        ),
        losses=replace(
            _losses(),
            local_weight=StagedSchedule(start=1.0, peak=1.0, end=0.5, cosine_steps=soon),
            gram=GramConfig(
                weight=StagedSchedule(start=0.0, peak=0.0, end=2.0, cosine_steps=soon),
                first_update=steps // 4,
                update_every=steps // 4,
                max_updates=3,
            ),
        ),
    )


def _highres(gram: StageConfig, scale: Scale) -> StageConfig:
    steps = max(20, scale.steps // 20)
    return replace(
        gram,
        name="highres",
        steps=steps,
        batch_size=max(16, scale.batch_size // 2),
        resolutions=tuple(
            Resolution(crops=_crops(g, local, gram=g * 3 // 2 // 16 * 16), share=share)
            for g, local, share in scale.highres
        ),
        optimizer=replace(
            gram.optimizer,
            lr=StagedSchedule(start=0.0, peak=0.0, end=2.5e-5, cosine_steps=steps // 3),
        ),
        losses=replace(_losses(), local_weight=constant(0.5), gram=GramConfig(weight=constant(1.5))),
    )


def _losses() -> LossConfig:
    """KoLeo in groups of 16 samples, whatever processes hold them, so that a step is the same on any number of them."""
    return LossConfig(koleo_weight=0.1, koleo_distributed=True, koleo_group_size=16)


def _crops(global_size: int, local_size: int, *, gram: int | None = None) -> CropConfig:
    mean, std = IMAGENET_STATS
    return CropConfig(mean=mean, std=std, global_size=global_size, local_size=local_size, gram_size=gram)
