"""Owns the collectives: one call that works under a process group and does nothing without one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["all_gather", "all_reduce", "rank", "world_size"]


def rank(group: dist.ProcessGroup | None = None) -> int:
    """This process's place in `group` (default: all processes); 0 where there is no process group."""
    return dist.get_rank(group) if _active() else 0


def world_size(group: dist.ProcessGroup | None = None) -> int:
    """The number of processes in `group` (default: all processes); 1 where there is no process group."""
    return dist.get_world_size(group) if _active() else 1


def all_reduce(x: Tensor, *, op: Literal["sum", "max"] = "sum", group: dist.ProcessGroup | None = None) -> Tensor:
    """Reduce `x` elementwise over the processes, in place, and return it. Not differentiable."""
    if world_size(group) > 1:
        dist.all_reduce(x, op=dist.ReduceOp.SUM if op == "sum" else dist.ReduceOp.MAX, group=group)
    return x


def all_gather(x: Tensor, *, group: dist.ProcessGroup | None = None) -> Tensor:
    """Concatenate every process's `x` [n, ...] along dimension 0, in rank order: [world·n, ...].

    Differentiable: the gradient that reaches a process's rows is summed over all processes. Every process must give
    the same shape.
    """
    gathered: Tensor = _AllGather.apply(x, group) if world_size(group) > 1 else x
    return gathered


def _active() -> bool:
    return dist.is_available() and dist.is_initialized()


class _AllGather(torch.autograd.Function):
    # torch's own differentiable gathers were renamed twice between 2.7 and 2.14; the two collectives below were not.

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group, ctx.rows = group, x.shape[0]
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(world_size(group))]
        dist.all_gather(parts, x, group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = all_reduce(grads[0].clone(memory_format=torch.contiguous_format), group=ctx.group)
        return total.narrow(0, rank(ctx.group) * ctx.rows, ctx.rows), None
