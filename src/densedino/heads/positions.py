"""Owns sine positions: of the cells of a grid, for segmentation and detection, and of numbers as such.

Vaswani et al. 2017, section 3.5, in two dimensions (Carion et al. 2020, appendix A.4): channels of y before those of x.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["sine_features", "sine_grid"]

_TEMPERATURE = 10_000.0
_EPS = 1e-6


def sine_features(values: Tensor, *, features: int) -> Tensor:
    """[...] to [..., features]: sine and cosine in turn, of falling frequency; `features` is even."""
    pair = torch.arange(features, device=values.device, dtype=torch.float32) // 2
    angles = values[..., None] / _TEMPERATURE ** (2 * pair / features)
    return torch.stack([angles[..., 0::2].sin(), angles[..., 1::2].cos()], dim=-1).flatten(-2)


def sine_grid(valid: Tensor, *, features: int, centred: bool) -> Tensor:
    """Positions [B, features, H, W] of the cells of a grid, as a share of its valid part.

    Args:
        valid: [B, H, W] bool, False in padding.
        features: channels in all, a multiple of 4: the first half for y.
        centred: cells are at their centres, as in detection; else at their far edges, as in segmentation.
    """
    parts = []
    for axis in (1, 2):
        count = valid.cumsum(axis, dtype=torch.float32)
        last = count[:, -1:] if axis == 1 else count[:, :, -1:]
        share = (count - 0.5 * centred) / (last + _EPS)
        parts.append(sine_features(share * (2 * math.pi), features=features // 2))
    return torch.cat(parts, dim=-1).permute(0, 3, 1, 2)
