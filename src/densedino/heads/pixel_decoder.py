"""Owns Mask2Former's pixel decoder (Cheng et al. 2022, section 3.2.2): a pyramid to mask features and a memory.

Its twin in `transformers` (Apache-2.0) is the oracle of the tests.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from densedino.heads.deformable import DeformableAttention, cell_centres
from densedino.heads.positions import sine_grid

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from densedino.heads.configs import Mask2FormerConfig
    from densedino.heads.vit_adapter import Pyramid

__all__ = ["PixelDecoder", "PixelFeatures"]

_GROUPS = 32


class PixelFeatures(NamedTuple):
    """What masks are made from."""

    features: Tensor
    """[B, D, H / 4, W / 4]."""
    memory: tuple[Tensor, ...]
    """[B, D, h, w] at strides 32, 16 and 8."""


class _EncoderLayer(nn.Module):
    def __init__(self, config: Mask2FormerConfig) -> None:
        super().__init__()
        dim = config.dim
        self.self_attn = DeformableAttention(dim, heads=config.heads, levels=3, points=4)
        self.norm1 = nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, config.hidden)
        self.linear2 = nn.Linear(config.hidden, dim)
        self.norm2 = nn.LayerNorm(dim)

    def forward(self, x: Tensor, position: Tensor, reference: Tensor, shapes: Sequence[tuple[int, int]]) -> Tensor:
        x = self.norm1(x + self.self_attn(x + position, reference, x, shapes))
        return self.norm2(x + self.linear2(F.relu(self.linear1(x))))


class _Layers(nn.Module):
    def __init__(self, config: Mask2FormerConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_EncoderLayer(config) for _ in range(config.encoder_layers))


class _Encoder(nn.Module):
    """Three maps that look into each other."""

    def __init__(self, config: Mask2FormerConfig) -> None:
        super().__init__()
        self.level_encoding = nn.Parameter(torch.zeros(3, config.dim))
        self.encoder = _Layers(config)

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        shapes = [(m.shape[2], m.shape[3]) for m in maps]
        places = [
            (map_positions(m) + level[:, None, None]).flatten(2).transpose(1, 2)
            for m, level in zip(maps, self.level_encoding, strict=True)
        ]
        position = torch.cat(places, dim=1)
        x = torch.cat([m.flatten(2).transpose(1, 2) for m in maps], dim=1)
        centres = cell_centres(shapes, device=x.device)[None, :, None].expand(len(x), -1, len(maps), -1)
        for layer in self.encoder.layers:
            x = layer(x, position, centres, shapes)
        parts = x.split([h * w for h, w in shapes], dim=1)
        return tuple(part.transpose(1, 2).unflatten(2, shape) for part, shape in zip(parts, shapes, strict=True))


def map_positions(x: Tensor) -> Tensor:
    """Sine positions of a map's cells, [1, D, h, w] for [B, D, h, w]."""
    everywhere = torch.ones(1, *x.shape[2:], dtype=torch.bool, device=x.device)
    return sine_grid(everywhere, features=x.shape[1], centred=False)


class _NormedConv(nn.Conv2d):
    """A convolution without bias, of strips of rows that it sees one by one, and group norm of the whole."""

    def __init__(self, dim: int, out: int, *, kernel: int) -> None:
        super().__init__(dim, out, kernel, padding=kernel // 2, bias=False)
        self.norm = nn.GroupNorm(_GROUPS, out)

    def forward(self, strips: Iterable[Tensor]) -> Tensor:
        return self.norm(torch.cat([self._conv_forward(strip, self.weight, None) for strip in strips], dim=2))


class PixelDecoder(nn.Module):
    """Maps of `dim` channels at strides 4, 8, 16, 32 to mask features at stride 4 and a memory at 32, 16, 8."""

    def __init__(self, dim: int, config: Mask2FormerConfig) -> None:
        super().__init__()
        inner = config.dim
        self.input_convs = nn.ModuleList(
            nn.Sequential(nn.Conv2d(dim, inner, kernel_size=1), nn.GroupNorm(_GROUPS, inner)) for _ in range(3)
        )
        self.encoder = _Encoder(config)
        self.mask_feature = nn.Conv2d(inner, inner, kernel_size=1)
        self.lateral_convs = nn.ModuleList([_NormedConv(dim, inner, kernel=1)])
        self.output_convs = nn.ModuleList([_NormedConv(inner, inner, kernel=3)])

    def forward(self, pyramid: Pyramid) -> PixelFeatures:
        """A pyramid of maps [B, dim, h, w]; its strips are used up."""
        lateral = self.lateral_convs[0](pyramid.fine)
        memory = self.encoder([conv(m) for conv, m in zip(self.input_convs, reversed(pyramid.coarse), strict=True)])
        lateral += F.interpolate(memory[2], size=lateral.shape[2:], mode="bilinear")
        return PixelFeatures(self.mask_feature(F.relu_(self.output_convs[0]([lateral]))), memory)
