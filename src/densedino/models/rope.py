"""Owns the axial rotary position embedding (DINOv3 paper, section 3.2; RoFormer, Su et al. 2021).

Patch centres lie in [-1, 1] on each axis, normalised by that axis' own length. Half of the rotation angles of a head
come from the row and half from the column. Prefix tokens (CLS, registers) are not rotated. Tables are float32 always,
computed from `base`: released checkpoints store the periods rounded to bfloat16, and rounding them moves features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from densedino.errors import StateDictError

if TYPE_CHECKING:
    import numpy as np

__all__ = ["RopeAugment", "RopeEmbed", "rope_angles", "rotate"]

_LARGE_BYTES = 1 << 25  # of float32: more than caches hold, so that it is rotated piece by piece on the CPU,
_PIECE_BYTES = 1 << 19  # as much at a time as a core's cache holds: up to 4 times as fast as all at once
_CACHE_SIZE = 8  # grids kept per module: one run sees few sizes, and a 64 x 64 grid of 64-d heads is 1 MB


@dataclass(frozen=True)
class RopeAugment:
    """Random changes of the coordinates, in training only (DINOv3 paper, section 3.2: "RoPE-box jittering").

    `shift`: uniform in [-shift, shift], one per axis. `jitter`: log-uniform factor in [1/jitter, jitter], one per axis.
    `rescale`: likewise, one for both axes. `per_block`: draw anew in every block, as the released training did.
    """

    shift: float | None = None
    jitter: float | None = None
    rescale: float | None = None
    per_block: bool = False

    def draw(self, rng: np.random.Generator) -> Tensor:
        """Shifts and factors of (row, column), [2, 2] float32: coordinates c become (c + shift)·factor."""
        shift = rng.uniform(-1.0, 1.0, 2) * (self.shift or 0.0)
        exponent = rng.uniform(-1.0, 1.0, 2) * math.log(self.jitter or 1.0)
        exponent = exponent + rng.uniform(-1.0, 1.0) * math.log(self.rescale or 1.0)
        return torch.tensor([shift.tolist(), [math.exp(e) for e in exponent]], dtype=torch.float32)


def rope_periods(head_dim: int, base: float, device: torch.device | None = None) -> Tensor:
    """Periods [head_dim / 4], float32: base ** (2i / (head_dim / 2))."""
    return base ** (torch.arange(head_dim // 4, dtype=torch.float32, device=device) * (4.0 / head_dim))


def rope_coords(height: int, width: int, device: torch.device | None = None) -> Tensor:
    """Patch centres (row, column) in [-1, 1], row-major: [height * width, 2] float32."""
    rows = (torch.arange(height, dtype=torch.float32, device=device) + 0.5) / height
    cols = (torch.arange(width, dtype=torch.float32, device=device) + 0.5) / width
    return torch.stack(torch.meshgrid(rows, cols, indexing="ij"), dim=-1).flatten(0, 1) * 2.0 - 1.0


def rope_angles(coords: Tensor, periods: Tensor) -> Tensor:
    """Angles [N, head_dim / 2] = [row angles, column angles] of coordinates [N, 2]."""
    return (2.0 * math.pi * coords[:, :, None] * (1.0 / periods)).flatten(1)  # as transformers rounds it


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate channel i of the first half together with channel i of the second half, in float32.

    Args:
        x: [B, N, ..., head_dim]; a new tensor is returned, `x` stays as it is.
        rope: cosines [N, head_dim] and sines [N, head_dim / 2], float32.
    """
    tracing = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]
    if x.device.type != "cpu" or torch.is_grad_enabled() or tracing or 4 * x.numel() < _LARGE_BYTES:
        return _rotate(x, rope)
    rows = max(1, _PIECE_BYTES * torch.get_num_threads() // (4 * x[0, :1].numel()))
    out = torch.empty(x.shape, dtype=x.dtype)
    cos, sin = rope
    for image, rotated in zip(x.split(1), out.split(1), strict=True):
        for i in range(0, x.shape[1], rows):
            rotated[:, i : i + rows] = _rotate(image[:, i : i + rows], (cos[i : i + rows], sin[i : i + rows]))
    return out


def _rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    middle = [1] * (x.ndim - 3)
    cos, sin = (table.view(x.shape[1], *middle, table.shape[-1]) for table in rope)
    half = sin.shape[-1]
    source = x.to(torch.promote_types(x.dtype, torch.float32))
    out = source * cos  # then in place on its halves: least memory traffic, which is what a rotation costs
    out[..., :half] -= source[..., half:] * sin
    out[..., half:] += source[..., :half] * sin
    return out.to(x.dtype)


class RopeEmbed(nn.Module):
    """Makes the tables of a grid; those without a warp are made once and kept."""

    def __init__(self, head_dim: int, *, base: float, num_prefix_tokens: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.base = base
        self.num_prefix_tokens = num_prefix_tokens
        self.periods = nn.Buffer(torch.empty(head_dim // 4, dtype=torch.float32))
        """In the state dict because released checkpoints have it; the tables do not read it."""
        self._cache: dict[tuple[int, int, torch.device], tuple[Tensor, Tensor]] = {}

    def reset_periods(self) -> None:
        """Fill the buffer from `base`."""
        self.periods.copy_(rope_periods(self.head_dim, self.base, self.periods.device))

    def forward(
        self, height: int, width: int, device: torch.device, *, warp: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Cosines [T, head_dim] and sines [T, head_dim / 2], float32; T = num_prefix_tokens + height * width.

        `warp` changes the coordinates, as `RopeAugment.draw` says.
        """
        if warp is not None or torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined]
            return self._tables(height, width, device, warp)
        key = (height, width, device)
        tables = self._cache.get(key)
        if tables is None:
            with torch.inference_mode(False), torch.no_grad():  # tables made in inference mode could not train later
                tables = self._tables(height, width, device)
            for oldest in list(self._cache)[: max(0, len(self._cache) + 1 - _CACHE_SIZE)]:
                self._cache.pop(oldest, None)  # another thread may have
            self._cache[key] = tables
        return tables

    def _tables(
        self, height: int, width: int, device: torch.device, warp: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(device.type, enabled=False):
            coords = rope_coords(height, width, device)
            if warp is not None:
                coords = (coords + warp[0]) * warp[1]
            angles = rope_angles(coords, rope_periods(self.head_dim, self.base, device))
            angles = nn.functional.pad(angles, (0, 0, self.num_prefix_tokens, 0))  # angle 0: prefix tokens stay
            return angles.cos().tile(2), angles.sin()

    def __getstate__(self) -> dict[str, Any]:
        """Leave the cached tables out of copies and pickles."""
        return {**self.__dict__, "_cache": {}}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take periods that are these up to bfloat16 rounding; refuse others, which mean another model."""
        stored = state_dict.get(prefix + "periods")
        exact = rope_periods(self.head_dim, self.base)
        if isinstance(stored, Tensor) and stored.device.type != "meta":
            if stored.shape != exact.shape or not torch.allclose(stored.float().cpu(), exact, rtol=2**-7, atol=0.0):
                raise StateDictError(
                    f"{prefix}periods are {stored.flatten()[:4].tolist()}…, but this model's RoPE (base {self.base:g}, "
                    f"head size {self.head_dim}) has {exact[:4].tolist()}…; the checkpoint is of another model."
                )
            state_dict = {**state_dict, prefix + "periods": exact.to(stored.device)}
        super()._load_from_state_dict(state_dict, prefix, *args)
