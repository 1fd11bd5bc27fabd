"""Owns what is said of a run before it begins: its stages in effective numbers, what it takes, what it writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from densedino.distributed import world_size
from densedino.models.counts import parameter_count
from densedino.pretrain.cost import head_parameters, image_multiplications, measure_rate, memory_bytes, state_bytes
from densedino.pretrain.outcome import is_loadable
from densedino.pretrain.step import step_values

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import torch

    from densedino.pretrain.settings import RunConfig, StageConfig

__all__ = ["Plan", "StagePlan", "describe", "make_plan"]


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """A stage in effective numbers."""

    stage: StageConfig
    images: int
    epochs: float
    lr: float
    """Highest learning rate in effect, scaled for the batch."""
    memory: int
    """Bytes, about, of a process."""
    seconds: float | None
    """About; None if nothing is known about the machine's speed."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run, before it begins."""

    config: RunConfig
    stages: tuple[StagePlan, ...]
    pictures: tuple[tuple[str, int], ...]
    """Name and size of each source."""
    device: torch.device
    output: Path
    processes: int
    rate: float | None
    """Multiplications a second of training steps on this machine, measured."""
    snapshot_bytes: int


def make_plan(
    config: RunConfig,
    *,
    pictures: Sequence[tuple[str, int]],
    device: torch.device,
    output: Path,
    measure: bool = True,
) -> Plan:
    """Work out what a run does and takes.

    Args:
        config: of the run.
        pictures: name and size of each source.
        device: that it runs on.
        output: its folder.
        measure: run three small steps to find out how long it takes.
    """
    rate = measure_rate(config, device=device) if measure else None
    total = sum(size for _, size in pictures)
    processes = world_size()
    stages = []
    for stage in config.stages:
        shares = sum(r.share for r in stage.resolutions)
        work = sum(image_multiplications(config, stage, r.crops) * r.share / shares for r in stage.resolutions)
        images = stage.steps * stage.batch_size
        stages.append(
            StagePlan(
                stage=stage,
                images=images,
                epochs=images / total,
                lr=max(step_values(stage, step).lr for step in _milestones(stage.steps)),
                memory=memory_bytes(
                    config,
                    stage,
                    micro_batch=_micro_batch(config, stage, processes),
                    device=device,
                    processes=processes,
                ),
                seconds=None if rate is None else images * work / rate / processes,
            )
        )
    return Plan(
        config=config,
        stages=tuple(stages),
        pictures=tuple(pictures),
        device=device,
        output=output,
        processes=processes,
        rate=rate,
        snapshot_bytes=state_bytes(config) * 4 // 5,  # no gradients
    )


def describe(plan: Plan) -> list[str]:
    """The plan in lines of text."""
    config = plan.config
    backbone = parameter_count(config.spec, in_chans=config.in_chans)
    heads = [head_parameters(head, config.spec.embed_dim) for head in (config.dino_head, config.ibot_head)]
    where = f"{plan.device}, {config.precision}" + (f", {plan.processes} processes" if plan.processes > 1 else "")
    lines = [
        f"model      {config.spec.name}, {backbone / 1e6:,.1f} M parameters, {config.in_chans} channels; heads"
        f" {heads[0] / 1e6:,.1f} M (DINO) and {heads[1] / 1e6:,.1f} M (iBOT)",
        f"pictures   {'; '.join(f'{size:,} in {name}' for name, size in plan.pictures)}",
        f"on         {where}; seed {config.seed}",
    ]
    for number, planned in enumerate(plan.stages, start=1):
        lines += _describe_stage(number, planned, config, plan.processes)
    seconds = "" if plan.rate is None else f"{_about(sum(p.seconds or 0.0 for p in plan.stages))}; "
    memory = max(planned.memory for planned in plan.stages)
    lines += [
        f"takes      {seconds}at most about {_size(memory)} of memory a process",
        f"writes     {plan.output}/: metrics.jsonl, report.html, snapshots of about {_size(plan.snapshot_bytes)}"
        f" (every {config.snapshots.every:,} steps, {config.snapshots.keep} kept), in the end model.safetensors",
    ]
    if not is_loadable(config):
        lines.append(
            f"note       {config.spec.name} is not in the table of architectures: densedino.load will not take it"
        )
    return lines


def _describe_stage(number: int, planned: StagePlan, config: RunConfig, processes: int) -> list[str]:
    stage = planned.stage
    optimizer, gram = stage.optimizer, stage.losses.gram
    first, last = step_values(stage, 0), step_values(stage, stage.steps - 1)
    sizes = ", ".join(
        f"{r.crops.num_global}×{r.crops.global_size} + {r.crops.num_local}×{r.crops.local_size} px"
        + (f" (Gram {r.crops.gram_size})" if r.crops.gram_size else "")
        + (f" at {r.share:g}" if len(stage.resolutions) > 1 else "")
        for r in stage.resolutions
    )
    micro = _micro_batch(config, stage, processes)
    cut = f", {micro} at a time" if micro * processes < stage.batch_size else ""
    start = {"previous": "the teacher of the stage before", "random": "random weights"}.get(stage.start, stage.start)
    lines = [
        f"stage {number}    {stage.name}: {stage.steps:,} steps of {stage.batch_size:,} images{cut} ="
        f" {planned.images:,} images, {planned.epochs:,.1f} epochs"
        + (f"; {_about(planned.seconds)}" if planned.seconds is not None else ""),
        f"           starts from {start}; crops {sizes}",
        f"           learning rate up to {planned.lr:.3g} ({optimizer.lr_scaling}), weight decay"
        f" {_span(first.weight_decay, last.weight_decay)}, EMA {_span(first.momentum, last.momentum)}, temperature"
        f" {_span(first.teacher_temperature, last.teacher_temperature)}",
    ]
    extras = [f"Gram weight {_span(first.gram_weight, last.gram_weight)}"] if gram else []
    extras += [f"drop path {stage.drop_path:g}"] if stage.drop_path else []
    extras += [f"backbone frozen for {stage.frozen_backbone_steps:,} steps"] if stage.frozen_backbone_steps else []
    return lines + ([f"           {', '.join(extras)}"] if extras else [])


def _micro_batch(config: RunConfig, stage: StageConfig, processes: int) -> int:
    share = stage.batch_size // processes
    return min(config.micro_batch_size or share, share)


def _milestones(steps: int) -> list[int]:
    return sorted({round(i * (steps - 1) / 200) for i in range(201)})


def _span(first: float, last: float) -> str:
    return f"{first:.3g}" if first == last else f"{first:.3g} → {last:.3g}"


def _about(seconds: float) -> str:
    for unit, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 1.5 * unit:
            return f"about {seconds / unit:,.1f} {name}"
    return f"about {seconds:,.0f} seconds"


def _size(count: float) -> str:
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.0f} MiB"
