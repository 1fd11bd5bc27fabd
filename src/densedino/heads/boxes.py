"""Owns boxes in pixels: corners and centres, and how a detector moves one."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["centres_of", "corners_of", "moved"]

_MOST_STRETCH = abs(math.log(16 / 1000))


def corners_of(boxes: Tensor) -> Tensor:
    """(cx, cy, w, h) [..., 4] to (x1, y1, x2, y2)."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def centres_of(corners: Tensor) -> Tensor:
    """(x1, y1, x2, y2) [..., 4] to (cx, cy, w, h)."""
    low, high = corners[..., :2], corners[..., 2:]
    return torch.cat([(low + high) / 2, high - low], dim=-1)


def moved(boxes: Tensor, deltas: Tensor, sizes: Tensor) -> Tensor:
    """Boxes (cx, cy, w, h) [B, N, 4] shifted by shares of their sides and stretched, then cut at the image's borders.

    Args:
        boxes: in pixels.
        deltas: [B, N, 4]: shifts in widths and heights, logarithms of the stretch, at most 62.5 either way.
        sizes: [B, 2], (W, H) of the images.
    """
    centre, side = boxes[..., :2], boxes[..., 2:]
    stretch = deltas[..., 2:].clamp(-_MOST_STRETCH, _MOST_STRETCH).exp()
    corners = corners_of(torch.cat([centre + side * deltas[..., :2], side * stretch], dim=-1))
    most = sizes.repeat(1, 2)[:, None]
    return centres_of(corners.clamp(min=0).minimum(most))
