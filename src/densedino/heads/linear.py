"""Owns the linear heads: an image classifier, and per-pixel classes or depth bins, each on normed tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from densedino.heads.tapping import maps_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from densedino.heads.tapping import Tap, TokensOf

__all__ = ["LinearClassifier", "LinearDepth", "LinearSegmentation"]


class LinearClassifier(nn.Linear):
    """Logits of CLS and the mean patch of the last block, side by side: the linear probe of the DINO papers."""

    def __init__(self, dim: int, *, classes: int) -> None:
        super().__init__(2 * dim, classes)

    def forward(self, image: Tensor, tokens_of: TokensOf) -> Tensor:  # type: ignore[override]
        """Normalised pixels [B, C, H, W] to logits [B, classes]."""
        (tap,) = tokens_of(image)
        return F.linear(torch.cat([tap.cls, tap.patches.mean(dim=(1, 2))], dim=-1), self.weight, self.bias)


def _joined(taps: Sequence[Tap]) -> Tensor:
    """Maps of all taps at the size of the first: [B, sum of D, h, w]."""
    first, *others = maps_of(taps)
    return torch.cat([first, *(F.interpolate(m, size=first.shape[2:], mode="bilinear") for m in others)], dim=1)


class LinearSegmentation(nn.Module):
    """Batch norm and one linear layer per patch; dropout of whole channels in training."""

    def __init__(self, dim: int, *, classes: int, taps: int = 1) -> None:
        super().__init__()
        self.dropout = nn.Dropout2d(0.1)
        self.batchnorm_layer = nn.BatchNorm2d(dim * taps)
        self.conv = nn.Conv2d(dim * taps, classes, kernel_size=1)

    def forward(self, taps: Sequence[Tap]) -> Tensor:
        """Logits [B, classes, h, w] at the size of the grid, which are what is resized to pixels."""
        return self.conv(self.batchnorm_layer(self.dropout(_joined(taps))))


class LinearDepth(nn.Module):
    """Batch norm and one linear layer per patch, to logits over bins of depth."""

    def __init__(self, dim: int, *, bins: int, taps: int = 1) -> None:
        super().__init__()
        self.batchnorm_layer = nn.BatchNorm2d(dim * taps)
        self.conv_depth = nn.Conv2d(dim * taps, bins, kernel_size=1)

    def forward(self, taps: Sequence[Tap]) -> Tensor:
        """Logits over bins [B, bins, h, w] at the size of the grid; the depth of them is what is resized."""
        return self.conv_depth(self.batchnorm_layer(_joined(taps)))
