"""Owns a mask transformer in the manner of EoMT (Kerssies et al. 2025, arXiv:2503.19108): queries among the patches.

Its blocks see queries and patches as one sequence, and a mask is the product of a query with upscaled patches. EoMT
puts the queries into the last blocks of the ViT; here they have blocks of their own, so that stored features do. One
query stands for each class, as in Segmenter (Strudel et al. 2021), so that labels of pixels train it without matching.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from densedino.heads.attention import MultiheadAttention, ReluMlp

if TYPE_CHECKING:
    from collections.abc import Sequence

    from densedino.heads.tapping import Tap

__all__ = ["MaskTransformer"]


class _Block(nn.Module):
    def __init__(self, dim: int, *, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = MultiheadAttention(dim, heads=heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm1(x)
        x = x + self.attn(normed, normed, normed)
        return x + self.mlp(self.norm2(x))


class _Upscale(nn.Module):
    """Twice the size, as EoMT does it: transposed convolution, GELU, depthwise 3×3, norm."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(dim, dim, 2, stride=2)
        self.mix = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)
        self.norm = nn.GroupNorm(1, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.mix(nn.functional.gelu(self.up(x))))


class MaskTransformer(nn.Module):
    """One tap to logits at 2^scale places per patch and side: [B, out, 2^scale · h, 2^scale · w]."""

    def __init__(self, dim: int, *, out: int, blocks: int = 2, scale: int = 2) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(1, out, dim) * 0.02)
        self.blocks = nn.ModuleList(_Block(dim, heads=max(1, dim // 64)) for _ in range(blocks))
        self.norm = nn.LayerNorm(dim)
        self.mask = ReluMlp(dim, dim, dim, depth=3)
        self.upscale = nn.Sequential(*(_Upscale(dim) for _ in range(scale)))

    def forward(self, taps: Sequence[Tap], pixels: Tensor | None = None) -> Tensor:
        """A tap [B, h, w, D]."""
        (tap,) = taps
        B, h, w, D = tap.patches.shape
        count = self.queries.shape[1]
        x = torch.cat([self.queries.expand(B, -1, -1), tap.patches.flatten(1, 2)], dim=1)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        patches = x[:, count:].transpose(1, 2).unflatten(2, (h, w))
        return torch.einsum("bqd,bdhw->bqhw", self.mask(x[:, :count]), self.upscale(patches)) * D**-0.5
