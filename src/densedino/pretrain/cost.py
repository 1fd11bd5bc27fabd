"""Owns what a training step costs, from shapes alone: parameters, multiplications, memory; and how fast it is here."""

from __future__ import annotations

import itertools
import math
import os
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from densedino.distributed import world_size
from densedino.models.catalog import ConvNeXtSpec
from densedino.models.counts import multiplications, parameter_count
from densedino.pretrain.crops import Crops
from densedino.pretrain.step import Batch, step_values, train_step
from densedino.pretrain.student_teacher import StudentTeacher, make_optimizer

if TYPE_CHECKING:
    from densedino.pretrain.crops import CropConfig
    from densedino.pretrain.settings import HeadConfig, RunConfig, StageConfig

__all__ = [
    "activation_bytes",
    "fitting_micro_batch",
    "head_parameters",
    "image_multiplications",
    "machine_memory",
    "measure_rate",
    "state_bytes",
]

# Floats that the backward pass finds again, for each token, block and channel: measured on ViTs in fp32, with a tenth
# to spare. Prototype losses hold blocks and a cache of bounded size.
_KEPT = {"none": 12.0, "selective": 8.0, "full": 2.0}
_LOSS_BYTES = 900 << 20
_PROCESS_BYTES = 600 << 20
_TRIAL, _TRIAL_LIMIT = 1e11, 4e11
"""Multiplications of a step that is timed, and of one image at most, on a CPU; a GPU gets a hundred times as many."""


def head_parameters(head: HeadConfig, embed_dim: int) -> int:
    """Parameters of a projection head."""
    widths = [embed_dim, *[head.hidden_dim] * (head.num_layers - 1), head.bottleneck_dim]
    inner = sum((before + 1) * after for before, after in itertools.pairwise(widths))
    return inner + head.bottleneck_dim * head.num_prototypes


def state_bytes(config: RunConfig) -> int:
    """Of student, its gradients and two moments, teacher, and a Gram teacher if a stage has one; fp32."""
    backbone = parameter_count(config.spec, in_chans=config.in_chans)
    heads = sum(head_parameters(head, config.spec.embed_dim) for head in (config.dino_head, config.ibot_head))
    gram = any(stage.losses.gram is not None and stage.losses.gram.source == "checkpoint" for stage in config.stages)
    return 4 * (5 * (backbone + heads) + gram * backbone)


def activation_bytes(config: RunConfig, crops: CropConfig) -> int:
    """That one image adds to a micro-batch: global and local crops go forward and backward one after the other."""
    spec = config.spec
    kept = _KEPT[config.activation_checkpointing]

    def crop(side: int) -> float:
        if isinstance(spec, ConvNeXtSpec):
            stages = enumerate(zip(spec.depths, spec.dims, strict=True))
            return sum((side // (4 * 2**i)) ** 2 * depth * dim * 1.5 * kept for i, (depth, dim) in stages)
        tokens = (side // spec.patch_size) ** 2 + 1 + spec.num_register_tokens
        return tokens * spec.depth * spec.embed_dim * kept

    return int(4 * max(crops.num_global * crop(crops.global_size), crops.num_local * crop(crops.local_size)))


def batch_bytes(crops: CropConfig) -> int:
    """Of one image's crops."""
    sizes = [(crops.num_global, crops.global_size), (crops.num_local, crops.local_size)]
    sizes += [(crops.num_global, crops.gram_size)] if crops.gram_size else []
    return sum(4 * len(crops.mean) * number * side**2 for number, side in sizes)


def memory_bytes(
    config: RunConfig, stage: StageConfig, *, micro_batch: int, device: torch.device, processes: int = 1
) -> int:
    """About what a process takes on `device` at its largest in a stage, besides its workers."""
    held = 1 if device.type == "cuda" else 2 + config.data.prefetch  # batches; those ahead wait in the main memory
    crops = [resolution.crops for resolution in stage.resolutions]
    batches = max(map(batch_bytes, crops)) * (stage.batch_size // processes) * held
    activations = max(activation_bytes(config, c) for c in crops) * micro_batch
    return state_bytes(config) + activations + batches + _LOSS_BYTES + _PROCESS_BYTES


def image_multiplications(config: RunConfig, stage: StageConfig, crops: CropConfig) -> float:
    """Of one image's share of a step: teachers forward, student forward and twice that backward."""
    G, L = crops.num_global, crops.num_local
    backbone = {
        side: multiplications(config.spec, side=side, in_chans=config.in_chans)
        for side in (crops.global_size, crops.local_size)
    }
    masked = stage.masks.probability * sum(stage.masks.ratio) / 2 * (crops.global_size // config.spec.stride) ** 2
    dino, ibot = (head_parameters(head, config.spec.embed_dim) for head in (config.dino_head, config.ibot_head))
    student = G * backbone[crops.global_size] + L * backbone[crops.local_size] + (G + L) * dino + G * masked * ibot
    teacher = G * (backbone[crops.global_size] + dino + masked * ibot)
    gram = stage.losses.gram
    if gram is not None and gram.source == "checkpoint":
        side = crops.gram_size or crops.global_size
        teacher += G * multiplications(config.spec, side=side, in_chans=config.in_chans)
    return 3.0 * student + teacher


def machine_memory(device: torch.device) -> int:
    """Bytes that a process may take on `device`: all of a GPU's, or this process's share of the main memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 8 << 30
    return pages // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def fitting_micro_batch(config: RunConfig, *, device: torch.device) -> int | None:
    """The most images at a time for which every stage should fit in six tenths of the memory; None if all do.

    It goes by the size of the machine, not by what is free, so that a run that goes on takes the same. A multiple of
    KoLeo's groups, so that a step stays the same.
    """
    most = math.inf
    group = 1
    for stage in config.stages:
        share = stage.batch_size // world_size()
        fixed = memory_bytes(config, stage, micro_batch=0, device=device, processes=world_size())
        rest = 0.6 * machine_memory(device) - fixed
        fits = rest / max(activation_bytes(config, r.crops) for r in stage.resolutions)
        if fits < share:
            most = min(most, fits)
            group = math.lcm(group, stage.losses.koleo_group_size or 1)
    return None if math.isinf(most) else max(group, int(most) // group * group)


def measure_rate(config: RunConfig, *, device: torch.device, steps: int = 2) -> float | None:
    """Multiplications a second of real training steps on `device`, on noise; None where one would take too long."""
    stage = config.stages[0]
    crops = stage.resolutions[0].crops
    each = image_multiplications(config, stage, crops)
    speed = 100 if device.type == "cuda" else 1
    if each > _TRIAL_LIMIT * speed:
        return None
    images = max(1, min(int(_TRIAL * speed / each), 64, stage.batch_size))
    stage = replace(stage, losses=replace(stage.losses, koleo_group_size=None))
    state = StudentTeacher(config, device=device)
    optimizer = make_optimizer(state.student, stage.optimizer, fidelity=config.fidelity)
    batch = _noise(crops, images, stride=config.spec.stride).to(device)
    took: list[float] = []
    for step in range(steps + 1):  # the first warms up
        start = time.perf_counter()
        train_step(
            state,
            optimizer,
            batch,
            stage=stage,
            values=step_values(stage, step),
            seed=0,
            step=step,
            precision=config.precision,
        )
        took.append(time.perf_counter() - start)
    return images * each / min(took[1:])


def _noise(crops: CropConfig, images: int, *, stride: int) -> Batch:
    generator = torch.Generator().manual_seed(0)

    def views(number: int, side: int) -> torch.Tensor:
        return torch.randn(number, images, len(crops.mean), side, side, generator=generator)

    patches = (crops.global_size // stride) ** 2
    return Batch(
        crops=Crops(
            global_crops=views(crops.num_global, crops.global_size),
            local_crops=views(crops.num_local, crops.local_size),
        ),
        masks=torch.rand(crops.num_global, images, patches, generator=generator) < 0.15,
        sample_ids=tuple(map(str, range(images))),
        places=range(images),
    )
