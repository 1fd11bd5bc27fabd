"""Owns the first stage of the detector: boxes of four sizes at every place, and what the image is like there."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ProposalMaps", "Proposals", "propose"]

_STRIDES = (8, 16, 32, 64)
_SIDE = 50.0  # pixels, of a box at stride 8
_BORDER = 0.01


class Proposals(NamedTuple):
    """All boxes of all levels, N per image."""

    features: Tensor
    """[B, N, D], zero where `boxes` are none."""
    boxes: Tensor
    """[B, N, 4], (cx, cy, w, h) in pixels."""
    sizes: Tensor
    """[B, 2], (W, H) of the images without padding, in pixels, float."""


class _ChannelNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.ln = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.ln(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ProposalMaps(nn.ModuleList):
    """A map at stride 16 to maps at strides 8, 16, 32 and 64."""

    def __init__(self, dim: int) -> None:
        def half() -> nn.Conv2d:
            return nn.Conv2d(dim, dim, kernel_size=2, stride=2)

        super().__init__(
            [
                nn.Sequential(nn.ConvTranspose2d(dim, dim, kernel_size=2, stride=2)),
                nn.Identity(),
                nn.Sequential(half()),
                nn.Sequential(half(), _ChannelNorm(dim), nn.GELU(), half()),
            ]
        )

    def forward(self, memory: Tensor) -> list[Tensor]:
        """[B, D, h, w] to [B, D, 2h, 2w], [B, D, h, w], [B, D, h // 2, w // 2], [B, D, h // 4, w // 4].

        h and w are 4 at least.
        """
        return [layer(memory) for layer in self]


def propose(maps: list[Tensor], padding: Tensor) -> Proposals:
    """Boxes for the cells of `maps`; those in padding, at a border or larger than the image are none.

    Args:
        maps: of `ProposalMaps`.
        padding: [B, h, w] bool at stride 16, True where there is no image.
    """
    masks = [F.interpolate(padding[:, None].float(), size=m.shape[2:])[:, 0].bool() for m in maps]
    finest = ~masks[0]
    sizes = _STRIDES[0] * torch.stack([finest[:, 0].sum(1), finest[:, :, 0].sum(1)], dim=-1).float()
    boxes = torch.cat([_boxes(m, level) for level, m in enumerate(maps)])[None]
    share = boxes / sizes.repeat(1, 2)[:, None]
    real = ((share > _BORDER) & (share < 1 - _BORDER)).all(-1) & ~torch.cat([m.flatten(1) for m in masks], dim=1)
    features = torch.cat([m.flatten(2).transpose(1, 2) for m in maps], dim=1)
    nowhere = float(max(maps[0].shape[2:]) * _STRIDES[0])
    return Proposals(
        features * real[..., None],
        torch.where(real[..., None], boxes, nowhere),
        sizes,
    )


def _boxes(level_map: Tensor, level: int) -> Tensor:
    stride, side = _STRIDES[level], _SIDE * 2**level
    height, width = level_map.shape[2:]
    y = (torch.arange(height, device=level_map.device) + 0.5) * stride
    x = (torch.arange(width, device=level_map.device) + 0.5) * stride
    y, x = torch.meshgrid(y, x, indexing="ij")
    flat = torch.stack([x, y], dim=-1).flatten(0, 1)
    return torch.cat([flat, torch.full_like(flat, side)], dim=-1)
