"""Owns how a training step is spread: over processes, replicated or sharded, and over memory and kernels in each.

Replicated: every process holds everything, and gradients are averaged once a step, after all micro-batches. Sharded:
FSDP2 holds each block's parameters in pieces. In both, a process gives the loss of its own images, and the mean over
processes is the loss of the global batch.
"""

from __future__ import annotations

import functools
import os
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Partial
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from densedino.distributed import all_reduce, world_size
from densedino.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import Tensor

__all__ = ["average_gradients", "blocks_of", "compile_blocks", "processes", "recompute_blocks", "shard", "whole"]

_BUCKET_BYTES = 64 << 20
# Products and attention are what costs; all that is cheap is computed again in the backward pass.
_SAVED = [
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
]


@contextmanager
def processes(device: str = "auto") -> Iterator[torch.device]:
    """The device of this process; under torchrun, also the process group, for as long as the context lasts.

    Args:
        device: auto (a GPU if there is one), cpu, cuda, cuda:1, mps.

    Raises:
        InputError: a device that is not there.
    """
    where = _device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield where
        return
    if where.type == "cuda":
        where = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(where)
    dist.init_process_group("nccl" if where.type == "cuda" else "gloo")
    try:
        yield where
    finally:
        dist.destroy_process_group()


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA raises AssertionError
        reason = str(error).partition("\n")[0]
        raise InputError(f"device {name!r} is not there: {reason}. Valid here: auto, cpu, or one that is.") from error
    return device


def blocks_of(backbone: nn.Module) -> list[nn.Module]:
    """The units of a ViT or ConvNeXt that are sharded, recomputed and compiled one by one."""
    stages = getattr(backbone, "stages", None)
    return [block for stage in stages for block in stage] if stages is not None else list(backbone.blocks)  # type: ignore[arg-type]


def shard(parts: Iterable[nn.Module]) -> None:
    """FSDP2 over all processes, in place: each part (a backbone, a head) is a root of its own, each block a unit.

    Parameters become DTensors with the names they had.
    """
    # Blocks give views of what their kernels wrote; nothing here adds to what a block gave in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
    for part in parts:
        if hasattr(part, "training_features"):
            for block in blocks_of(part):
                fully_shard(block)
        fully_shard(part, reshard_after_forward=True)  # a teacher has no backward pass that would do it
        if hasattr(part, "training_features"):
            register_fsdp_forward_method(part, "training_features")


def whole(weight: Tensor) -> Tensor:
    """`weight` as a plain tensor. Of a sharded one: all of it, and its gradient is the mean over processes."""
    if not isinstance(weight, DTensor):
        return weight
    full: Tensor = weight.full_tensor(grad_placements=[Partial()] * weight.device_mesh.ndim)
    if full.requires_grad:
        full.register_hook(functools.partial(torch.mul, other=1 / world_size()))  # Partial() sums
    return full


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Make each gradient the mean over processes; sharded parameters have it already. Without a group, nothing.

    Every process must call it with the same parameters. One without a gradient here may have one elsewhere: it counts
    as zero, and gets the mean too.
    """
    if world_size() == 1:
        return
    bucket: list[nn.Parameter] = []
    size = 0
    for parameter in (p for p in parameters if p.requires_grad and not isinstance(p, DTensor)):
        if bucket and (size + parameter.nbytes > _BUCKET_BYTES or parameter.dtype != bucket[0].dtype):
            _average(bucket)
            bucket, size = [], 0
        bucket.append(parameter)
        size += parameter.nbytes
    if bucket:
        _average(bucket)


def _average(bucket: list[nn.Parameter]) -> None:
    present = torch.tensor([float(p.grad is not None) for p in bucket], device=bucket[0].device)
    present = all_reduce(present, op="max")
    flat = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in bucket])
    means = all_reduce(flat).div_(world_size()).split([p.numel() for p in bucket])
    for parameter, mean, wanted in zip(bucket, means, present.tolist(), strict=True):
        if wanted:
            parameter.grad = mean.view_as(parameter)


def recompute_blocks(backbone: nn.Module, *, how: Literal["selective", "full"]) -> None:
    """Activation checkpointing of every block, in place: what is not kept is computed again in the backward pass.

    "selective" keeps the results of matrix products and attention, "full" a block's input only.
    """
    keep = functools.partial(create_selective_checkpoint_contexts, _SAVED)
    for block in blocks_of(backbone):
        recomputed = functools.partial(checkpoint, block.forward, use_reentrant=False)
        block.forward = functools.partial(recomputed, context_fn=keep) if how == "selective" else recomputed


def compile_blocks(backbone: nn.Module) -> None:
    """torch.compile of every block, in place, names kept. Blocks are alike, so one compilation serves all."""
    for block in blocks_of(backbone):
        block.compile(dynamic=False)
