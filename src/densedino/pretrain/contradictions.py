"""Owns what in a run does not go together: found in all stages at once, before step 0."""

from __future__ import annotations

from typing import TYPE_CHECKING

from densedino.errors import InputError
from densedino.models.catalog import ConvNeXtSpec
from densedino.pretrain.schedules import CosineSchedule

if TYPE_CHECKING:
    from collections.abc import Iterator

    from densedino.pretrain.crops import CropConfig
    from densedino.pretrain.schedules import Schedule
    from densedino.pretrain.settings import RunConfig, StageConfig

__all__ = ["find_contradictions", "validate"]


def validate(config: RunConfig, *, world_size: int = 1) -> None:
    """Refuse a run that cannot be what was meant.

    Args:
        config: the run.
        world_size: processes that share the batch.

    Raises:
        InputError: with every contradiction, its place, and what to do.
    """
    problems = find_contradictions(config, world_size=world_size)
    if problems:
        count = f"{len(problems)} contradictions" if len(problems) > 1 else "a contradiction"
        raise InputError(f"{count} in the configuration of this run:\n  " + "\n  ".join(problems))


def find_contradictions(config: RunConfig, *, world_size: int = 1) -> list[str]:
    """What `validate` refuses, a line each; empty if all is well."""
    problems = list(_between_stages(config))
    for number, stage in enumerate(config.stages):
        found = [*_crops(config, stage), *_losses(stage), *_course(stage), *_batches(config, stage, world_size)]
        problems += [f"stages[{number}] ({stage.name}): {problem}" for problem in found]
    return problems


def _between_stages(config: RunConfig) -> Iterator[str]:
    if config.stages[0].start == "previous":
        yield (
            f"stages[0] ({config.stages[0].name}): start='previous', but no stage comes before. Set start='random', or"
            " to weights."
        )
    names = [stage.name for stage in config.stages]
    if len(set(names)) < len(names):
        yield f"stages are called {', '.join(names)}; give each its own name, as a name is a folder."


def _crops(config: RunConfig, stage: StageConfig) -> Iterator[str]:
    stride = config.spec.stride
    for number, resolution in enumerate(stage.resolutions):
        crops, place = resolution.crops, f"resolutions[{number}].crops"
        if len(crops.mean) != config.in_chans:
            yield f"{place}.mean has {len(crops.mean)} channels, in_chans is {config.in_chans}. Make them equal."
        for name in ("global_size", "local_size", "gram_size"):
            size = getattr(crops, name)
            if size is not None and size % stride:
                nearest = max(stride, round(size / stride) * stride)
                yield f"{place}.{name}={size} is no multiple of {config.spec.name}'s stride {stride}. Use {nearest}."
        if crops.local_from_global and crops.stride != stride:
            yield f"{place}.stride={crops.stride}, but {config.spec.name} has {stride}. Set it to {stride}."
        if crops.num_global * (crops.num_global - 1 + crops.num_local) < 1:
            yield f"{place} has {crops.num_global} global and {crops.num_local} local crops: no pair to compare."
        if crops.fidelity != config.fidelity:
            yield (
                f"{place}.fidelity={crops.fidelity!r}, but the run's is {config.fidelity!r}. Use"
                " config.with_fidelity(…), which sets both."
            )
        yield from _gram_crops(crops, stage, place)


def _gram_crops(crops: CropConfig, stage: StageConfig, place: str) -> Iterator[str]:
    if crops.gram_size is None:
        return
    if stage.losses.gram is None:
        yield f"{place}.gram_size={crops.gram_size}, but losses.gram is None: nobody sees such crops. Set both or none."
    elif stage.losses.gram.source == "ema":
        yield (
            f"{place}.gram_size={crops.gram_size}, but losses.gram.source='ema' reads the EMA teacher's view of the"
            " global crops. Set gram_size=None, or source='checkpoint'."
        )


def _losses(stage: StageConfig) -> Iterator[str]:
    losses = stage.losses
    if losses.dino_weight == losses.ibot_weight == 0:
        yield "losses.dino_weight and losses.ibot_weight are 0: nothing is learnt from the teacher. Set one of them."
    if losses.koleo_group_size is not None and losses.koleo_topk >= losses.koleo_group_size:
        yield (
            f"losses.koleo_topk={losses.koleo_topk} neighbours in groups of {losses.koleo_group_size} samples. Use"
            f" at most {losses.koleo_group_size - 1}."
        )
    gram = losses.gram
    if gram is not None and gram.first_update is not None and gram.first_update >= stage.steps:
        yield (
            f"losses.gram.first_update={gram.first_update} is after the stage's {stage.steps} steps; they count from"
            " its own step 0. Set an earlier step, or None."
        )


def _course(stage: StageConfig) -> Iterator[str]:
    optimizer, losses = stage.optimizer, stage.losses
    schedules: dict[str, tuple[Schedule, float, float]] = {
        "optimizer.lr": (optimizer.lr, 0, 1e3),
        "optimizer.weight_decay": (optimizer.weight_decay, 0, 1e3),
        "optimizer.momentum": (optimizer.momentum, 0, 1),
        "optimizer.teacher_temperature": (optimizer.teacher_temperature, 1e-3, 1e3),
        "losses.local_weight": (losses.local_weight, 0, 1e6),
    }
    if losses.gram is not None:
        schedules["losses.gram.weight"] = (losses.gram.weight, 0, 1e6)
    for name, (schedule, low, high) in schedules.items():
        values = _milestones(schedule)
        if not all(low <= value <= high for value in values):
            yield f"{name} goes through {', '.join(f'{v:g}' for v in values)}; valid: {low:g} to {high:g}."
        if isinstance(schedule, CosineSchedule) and schedule.total_steps != stage.steps:
            yield f"{name}.total_steps={schedule.total_steps}, but the stage has {stage.steps} steps. Make them equal."
    if optimizer.lr.warmup_steps >= stage.steps:
        yield f"optimizer.lr.warmup_steps={optimizer.lr.warmup_steps} of {stage.steps} steps: it never ends. Use fewer."
    if optimizer.last_layer_freeze_steps >= stage.steps:
        yield (
            f"optimizer.last_layer_freeze_steps={optimizer.last_layer_freeze_steps} of {stage.steps} steps: the"
            " prototypes never learn. Use fewer."
        )
    if stage.frozen_backbone_steps > stage.steps:
        yield f"frozen_backbone_steps={stage.frozen_backbone_steps} of {stage.steps} steps. Use at most as many."


def _milestones(schedule: Schedule) -> tuple[float, ...]:
    if isinstance(schedule, CosineSchedule):
        return (
            (schedule.warmup_start, schedule.base, schedule.final)
            if schedule.warmup_steps
            else (schedule.base, schedule.final)
        )
    return schedule.start, schedule.peak, schedule.end


def _batches(config: RunConfig, stage: StageConfig, world_size: int) -> Iterator[str]:
    if stage.rope is not None:
        if isinstance(config.spec, ConvNeXtSpec):
            yield f"rope={stage.rope}, but {config.spec.name} is a ConvNeXt and has none. Set rope=None."
        elif stage.rope.per_block != (config.fidelity == "released"):
            yield (
                f"rope.per_block={stage.rope.per_block}, but the run's fidelity is {config.fidelity!r}. Use"
                " config.with_fidelity(…), which sets both."
            )
    if stage.batch_size % world_size:
        yield f"batch_size={stage.batch_size} cannot be shared by {world_size} processes. Use a multiple of these."
        return
    share = stage.batch_size // world_size
    micro = min(config.micro_batch_size or share, share)
    losses, parts = stage.losses, {micro, share % micro or micro}
    for images in sorted(part * (world_size if losses.koleo_distributed else 1) for part in parts):
        group = losses.koleo_group_size or images
        if losses.koleo_weight > 0 and (images % group or images < 2):
            yield (
                f"KoLeo's groups of {group} samples do not divide the {images} that are there at a time"
                f" (batch_size={stage.batch_size}, {world_size} processes, micro_batch_size={config.micro_batch_size},"
                f" koleo_distributed={losses.koleo_distributed}). Set losses.koleo_group_size to a divisor of at least"
                " 2, or koleo_weight=0."
            )
