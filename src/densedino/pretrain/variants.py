"""Owns variants of a run: another length, batch or number of channels, with all that must go along."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from densedino.errors import InputError
from densedino.pretrain.schedules import CosineSchedule

if TYPE_CHECKING:
    from collections.abc import Sequence

    from densedino.pretrain.schedules import Schedule
    from densedino.pretrain.settings import GramConfig, Resolution, RunConfig, StageConfig
    from densedino.pretrain.sources import Source

__all__ = ["channel_statistics", "with_batch_size", "with_channels", "with_steps"]

SAMPLE = 256
"""Pictures that statistics are measured on."""


def with_steps(config: RunConfig, steps: int) -> RunConfig:
    """The same course in `steps` steps of all stages together: everything that counts steps is scaled alike.

    Raises:
        InputError: fewer steps than stages.
    """
    if steps < len(config.stages):
        raise InputError(f"{steps} steps for {len(config.stages)} stages; give each at least one.")
    before = sum(stage.steps for stage in config.stages)
    lengths = [max(1, round(stage.steps * steps / before)) for stage in config.stages]
    lengths[lengths.index(max(lengths))] += steps - sum(lengths)
    return replace(config, stages=tuple(map(_scaled, config.stages, lengths)))


def with_batch_size(config: RunConfig, batch_size: int) -> RunConfig:
    """The same steps with `batch_size` images in the first stage, and in the others as many in proportion.

    Learning rates follow by `lr_scaling`. KoLeo's groups become smaller where they would not divide a batch.
    """
    first = config.stages[0].batch_size

    def stage(old: StageConfig) -> StageConfig:
        size = max(1, round(old.batch_size * batch_size / first))
        group = old.losses.koleo_group_size
        losses = old.losses if group is None else replace(old.losses, koleo_group_size=math.gcd(group, size))
        return replace(old, batch_size=size, losses=losses)

    return replace(config, stages=tuple(map(stage, config.stages)))


def with_channels(
    config: RunConfig, *, mean: Sequence[float], std: Sequence[float], rgb: tuple[int, int, int] | None
) -> RunConfig:
    """The same run on pictures with other channels.

    Args:
        config: of the run.
        mean: of each channel, of values in [0, 1].
        std: of each channel.
        rgb: the channels that are red, green and blue, or None.
    """

    def changed(old: Resolution) -> Resolution:
        return replace(old, crops=replace(old.crops, mean=tuple(mean), std=tuple(std), rgb=rgb))

    def stage(old: StageConfig) -> StageConfig:
        return replace(old, resolutions=tuple(map(changed, old.resolutions)))

    return replace(config, in_chans=len(mean), stages=tuple(map(stage, config.stages)))


def channel_statistics(
    sources: Sequence[Source], *, images: int = SAMPLE
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of every channel, of values in [0, 1], over pictures spread evenly over the sources.

    To three digits, so that they do not change with the last bit of a sum. NaN pixels do not count.
    """
    total = sum(map(len, sources))
    places = [(2 * i + 1) * total // (2 * min(total, images)) for i in range(min(total, images))]
    sums: list[torch.Tensor] = []
    start = 0
    for source in sources:
        for place in places:
            if start <= place < start + len(source):
                sums.append(_sums(source.read(place - start)))
        start += len(source)
    count, first, second = torch.stack(sums).sum(0)
    mean = first / count.clamp(min=1)
    std = (second / count.clamp(min=1) - mean**2).clamp(min=0).sqrt().clamp(min=1e-3)
    return tuple(float(f"{m:.3g}") for m in mean.tolist()), tuple(float(f"{s:.3g}") for s in std.tolist())


def _sums(image: torch.Tensor) -> torch.Tensor:
    white = {torch.uint8: 255.0, torch.uint16: 65535.0}.get(image.dtype, 1.0)
    x = image.double().flatten(1) / white
    there = torch.isfinite(x)
    x = x.masked_fill(~there, 0)
    return torch.stack([there.sum(1).double(), x.sum(1), (x**2).sum(1)])


def _scaled(stage: StageConfig, steps: int) -> StageConfig:
    factor = steps / stage.steps

    def count(number: int) -> int:
        return round(number * factor)

    def schedule(old: Schedule) -> Schedule:
        if isinstance(old, CosineSchedule):
            whole = steps if old.total_steps == stage.steps else count(old.total_steps)
            return replace(
                old, total_steps=whole, warmup_steps=count(old.warmup_steps), freeze_steps=count(old.freeze_steps)
            )
        return replace(old, warmup_steps=count(old.warmup_steps), cosine_steps=count(old.cosine_steps))

    def gram(old: GramConfig) -> GramConfig:
        return replace(
            old,
            weight=schedule(old.weight),
            first_update=None if old.first_update is None else min(count(old.first_update), steps - 1),
            update_every=None if old.update_every is None else max(1, count(old.update_every)),
        )

    optimizer, losses = stage.optimizer, stage.losses
    return replace(
        stage,
        steps=steps,
        frozen_backbone_steps=count(stage.frozen_backbone_steps),
        optimizer=replace(
            optimizer,
            lr=schedule(optimizer.lr),
            weight_decay=schedule(optimizer.weight_decay),
            momentum=schedule(optimizer.momentum),
            teacher_temperature=schedule(optimizer.teacher_temperature),
            last_layer_freeze_steps=count(optimizer.last_layer_freeze_steps),
        ),
        losses=replace(losses, local_weight=schedule(losses.local_weight), gram=losses.gram and gram(losses.gram)),
    )
