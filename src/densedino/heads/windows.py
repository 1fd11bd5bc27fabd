"""Owns features of a large image from windows: each through the backbone by itself, and the whole one made small."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from densedino.errors import InputError
from densedino.heads.tapping import maps_of

if TYPE_CHECKING:
    from densedino.heads.tapping import TokensOf

__all__ = ["windowed_features"]

_PATCH = 16


def _bounds(side: int, windows: int) -> list[tuple[int, int]]:
    """Windows of whole patches, all of one length but for the last, which has the rest."""
    length = -(-(side // windows) // _PATCH) * _PATCH
    starts = [i * length for i in range(windows)]
    if side % _PATCH or starts[-1] >= side:
        raise InputError(
            f"a side of {side} pixels cannot be cut into {windows} windows of whole {_PATCH}-pixel patches. Use a "
            f"larger image, with sides that are multiples of {_PATCH}."
        )
    return [(start, min(start + length, side)) for start in starts]


def windowed_features(image: Tensor, tokens_of: TokensOf, *, windows: int) -> Tensor:
    """All taps of the whole and of the windows on channels: [B, 2 * taps * D, H / 16, W / 16], the whole's first.

    Args:
        image: [B, 3, H, W], normalised.
        tokens_of: of the backbone.
        windows: along each side.

    Raises:
        InputError: H or W is no multiple of 16, or too small.
    """
    rows, columns = (_bounds(side, windows) for side in image.shape[2:])
    grid = (image.shape[2] // _PATCH, image.shape[3] // _PATCH)

    def features(pixels: Tensor) -> Tensor:
        return torch.cat(maps_of(tokens_of(pixels)), dim=1)

    tiled = torch.cat(
        [torch.cat([features(image[:, :, y0:y1, x0:x1]) for x0, x1 in columns], dim=3) for y0, y1 in rows], dim=2
    )
    small = F.interpolate(image, size=(rows[0][1], columns[0][1]), mode="bilinear", antialias=True)
    whole = F.interpolate(features(small), size=grid, mode="bilinear", antialias=True)
    return torch.cat([whole, tiled], dim=1)
