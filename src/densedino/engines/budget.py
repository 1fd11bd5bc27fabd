"""Owns what a run takes in bytes: weights, a batch's activations, the process itself; and how it fits in a budget."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from densedino.errors import InputError
from densedino.models.counts import block_parameters

if TYPE_CHECKING:
    import torch

    from densedino.models.catalog import ViTSpec

__all__ = [
    "StreamPlan",
    "available_bytes",
    "block_bytes",
    "format_bytes",
    "least_stream",
    "parse_bytes",
    "plan_stream",
    "resident_bytes",
]

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_SLACK = 64 << 20
"""For what PyTorch's kernels set up when they first run, and what the C library keeps of freed memory."""
_ENOUGH_TOKENS = 16_384  # in a product: oneDNN lays the weights out anew for each, which takes as long as 200 tokens


def parse_bytes(text: str | int) -> int:
    """Bytes of "3GB" (10⁹), "2.5GiB" (2³⁰), "800MB" or a number.

    Raises:
        InputError: none of these, or not above zero.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?i?)b?\s*", str(text).lower())
    if match is None or match[2] not in _UNITS or not float(match[1]):
        raise InputError(f"memory {text!r}: give a size such as '3GB', '2.5GiB' or '800MB'.")
    return round(float(match[1]) * _UNITS[match[2]])


def format_bytes(number: float) -> str:
    """In GB (10⁹) with two digits, below one in MB."""
    return f"{number / 1e9:.2f} GB" if number >= 1e9 else f"{number / 1e6:.0f} MB"


def resident_bytes() -> int:
    """Memory of this process that is in RAM now; 0 where the system does not say."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(next(line for line in status.read_text().splitlines() if line.startswith("VmRSS")).split()[1]) << 10
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # the nearest that macOS gives without more packages
    return peak if sys.platform == "darwin" else peak << 10


def block_bytes(spec: ViTSpec, dtype: torch.dtype) -> int:
    """Of one block's parameters, matrices in `dtype`, as a buffer for it has them."""
    return block_parameters(spec) * dtype.itemsize


def _matrix_bytes(spec: ViTSpec, dtype: torch.dtype) -> int:
    """Of the largest matrix, which oneDNN lays out anew for each product."""
    return spec.embed_dim * max(3 * spec.embed_dim, spec.hidden_dim) * dtype.itemsize


def token_bytes(spec: ViTSpec, dtype: torch.dtype) -> tuple[int, int]:
    """Temporaries per token of (attention, feed-forward), at their largest; the residual stream not counted.

    Attention: the normed tokens in float32; queries, keys and values; the rotated ones, then as kernels want them, and
    the result. Feed-forward: the normed tokens, once more in `dtype`, and twice the hidden ones.
    """
    size, dim, hidden = dtype.itemsize, spec.embed_dim, spec.hidden_dim
    attention = 4 * dim + (3 + 2 + 3 + 2) * dim * size
    inner = 2 * hidden * size
    return attention, 4 * dim + dim * size + max(inner, 4 * dim + dim * size)


@dataclass(frozen=True, kw_only=True)
class StreamPlan:
    """How a batch goes through a model that is read block by block."""

    attention_images: int
    """At a time."""
    mlp_tokens: int
    """At a time."""
    buffers: int
    """Blocks in memory: 2 where the next one is read while one computes."""
    peak_bytes: int
    """Of the process, what it holds already counted."""


def plan_stream(
    spec: ViTSpec, *, images: int, tokens: int, outputs: int, dtype: torch.dtype, budget: int, resident: int
) -> StreamPlan:
    """The fastest that fits: with reading ahead or without, and with temporaries as large as fit and help.

    Args:
        spec: of the model.
        images: in the batch. All of them stay in memory, as the residual stream that becomes the result.
        tokens: per image, CLS and registers counted.
        outputs: blocks whose tokens are wanted.
        dtype: of the matrix products.
        budget: bytes that the process may have.
        resident: bytes that it has, without the buffers for blocks.

    Raises:
        InputError: it does not fit; the message says what would.
    """
    for buffers in (2, 1):
        plan = _fit(spec, images, tokens, outputs=outputs, dtype=dtype, room=budget - resident, buffers=buffers)
        if plan.peak_bytes + resident <= budget:
            return replace(plan, peak_bytes=plan.peak_bytes + resident)
    raise InputError(
        f"memory {format_bytes(budget)} is too small: {spec.name} on {images} image{'s' * (images > 1)} of {tokens:,} "
        f"tokens needs at least {format_bytes(plan.peak_bytes + resident + 5e6)}, of which this process has "
        f"{format_bytes(resident)} already and one block {format_bytes(block_bytes(spec, dtype))}. Give more memory, "
        "fewer images at once (batch_size), or smaller ones."
    )


def least_stream(
    spec: ViTSpec, *, images: int, tokens: int, outputs: int, dtype: torch.dtype, resident: int
) -> StreamPlan:
    """The plan that takes the least memory, and the most time. Arguments as for `plan_stream`."""
    plan = _fit(spec, images, tokens, outputs=outputs, dtype=dtype, room=0, buffers=1)
    return replace(plan, peak_bytes=plan.peak_bytes + resident)


def _fit(
    spec: ViTSpec, images: int, tokens: int, *, outputs: int, dtype: torch.dtype, room: int, buffers: int
) -> StreamPlan:
    """Temporaries as large as fit into `room` and help, or as small as possible; `peak_bytes` without the process."""
    whole = images * tokens
    stream = 4 * spec.embed_dim * whole
    attention, mlp = token_bytes(spec, dtype)
    fixed = _SLACK + buffers * block_bytes(spec, dtype) + _matrix_bytes(spec, dtype) + outputs * stream
    room -= fixed
    rounds = -(-images // max(1, min(images, room // (attention * tokens), -(-_ENOUGH_TOKENS // tokens))))
    at_once = -(-images // rounds)  # evenly
    rounds = -(-whole // max(min(whole, 256), min(whole, room // mlp, _ENOUGH_TOKENS)))
    mlp_tokens = -(-whole // rounds)
    return StreamPlan(
        attention_images=at_once,
        mlp_tokens=mlp_tokens,
        buffers=buffers,
        peak_bytes=fixed + max(at_once * tokens * attention, mlp_tokens * mlp),
    )


def available_bytes() -> int:
    """Memory that this machine, or this process's control group, has free; all of it where the system does not say."""
    info = Path("/proc/meminfo")
    if not info.exists():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 1 << 62
    free = next(int(line.split()[1]) for line in info.read_text().splitlines() if line.startswith("MemAvailable")) << 10
    group = Path("/sys/fs/cgroup")
    limit, used = (_number(group / name) for name in ("memory.max", "memory.current"))
    return free if limit is None or used is None else min(free, max(0, limit - used))


def _number(path: Path) -> int | None:
    text = path.read_text().strip() if path.exists() else ""
    return int(text) if text.isdigit() else None
