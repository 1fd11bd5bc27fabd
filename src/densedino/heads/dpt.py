"""Owns the dense prediction transformer's head (Ranftl et al. 2021): four taps, reassembled and fused, to logits.

One class with the options of its two released variants: depth (SYNTHMIX) and canopy height (CHMv2, whose twin in
`transformers`, Apache-2.0, is the oracle of the tests).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from densedino.heads.bins import depth_of
from densedino.heads.tapping import centre_pad, maps_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from densedino.heads.configs import DptConfig
    from densedino.heads.tapping import Tap, TokensOf

__all__ = ["Dpt"]

_PATCH = 16


class _Conv(nn.Module):
    """A convolution, under the name that the files have for it."""

    def __init__(self, dim: int, out: int, *, kernel: int, bias: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, out, kernel, padding=kernel // 2, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class _Reassemble(nn.Module):
    """Four maps of one size to maps of 4, 2, 1 and half the size, of widths of their own."""

    def __init__(self, dim: int, config: DptConfig) -> None:
        super().__init__()
        widths = config.reassembled
        self.projects = nn.ModuleList(_Conv(dim, width, kernel=1) for width in widths)
        self.resize_layers = nn.ModuleList(
            [
                nn.ConvTranspose2d(widths[0], widths[0], kernel_size=4, stride=4),
                nn.ConvTranspose2d(widths[1], widths[1], kernel_size=2, stride=2),
                nn.Identity(),
                nn.Conv2d(widths[3], widths[3], kernel_size=3, stride=2, padding=1),
            ]
        )
        self.readout_projects = nn.ModuleList(
            nn.Sequential(nn.Linear(2 * dim, dim), nn.GELU()) for _ in widths if config.reads_cls
        )
        self.batchnorm_layers = nn.ModuleList(nn.BatchNorm2d(dim) for _ in widths if config.norms_inputs)

    def forward(self, taps: Sequence[Tap]) -> list[Tensor]:
        maps = maps_of(taps)
        for i, tap in enumerate(taps):
            if self.readout_projects:
                cls = tap.cls[:, None, None].expand_as(tap.patches)
                maps[i] = self.readout_projects[i](torch.cat([tap.patches, cls], dim=-1)).permute(0, 3, 1, 2)
            if self.batchnorm_layers:
                maps[i] = self.batchnorm_layers[i](maps[i])
            maps[i] = self.resize_layers[i](self.projects[i](maps[i]))
        return maps


class _Residual(nn.Module):
    """Two 3x3 convolutions beside a shortcut, each after a ReLU."""

    def __init__(self, dim: int, *, bias: bool) -> None:
        super().__init__()
        self.conv1 = _Conv(dim, dim, kernel=3, bias=bias)
        self.conv2 = _Conv(dim, dim, kernel=3, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


class _Fusion(nn.Module):
    """What comes from below, joined with a map of this level, at twice the size."""

    def __init__(self, dim: int, *, bias: bool, joins: bool) -> None:
        super().__init__()
        self.project = _Conv(dim, dim, kernel=1)
        if joins:
            self.res_conv_unit1 = _Residual(dim, bias=bias)
        self.res_conv_unit2 = _Residual(dim, bias=bias)

    def forward(self, x: Tensor, level: Tensor | None = None) -> Tensor:
        if level is not None:
            if level.shape[2:] != x.shape[2:]:
                level = F.interpolate(level, size=x.shape[2:], mode="bilinear")
            x = x + self.res_conv_unit1(level)
        return self.project(_doubled(self.res_conv_unit2(x)))


def _doubled(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)


class _Doubling(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _doubled(x)


class _Out(nn.Module):
    def __init__(self, dim: int, hidden: int, out: int) -> None:
        super().__init__()
        self.head = nn.Sequential(
            nn.Conv2d(dim, dim // 2, kernel_size=3, padding=1),
            _Doubling(),
            nn.Conv2d(dim // 2, hidden, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(hidden, out, kernel_size=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)


class Dpt(nn.Module):
    """Pixels and the taps of four blocks to depth in metres."""

    def __init__(self, dim: int, config: DptConfig) -> None:
        super().__init__()
        width, bias = config.width, config.residual_bias
        self.bins = config.bins
        self.reassemble_blocks = _Reassemble(dim, config)
        self.convs = nn.ModuleList(_Conv(p, width, kernel=3, bias=False) for p in config.reassembled)
        self.fusion_blocks = nn.ModuleList(_Fusion(width, bias=bias, joins=level > 0) for level in range(4))
        self.project = _Conv(width, width, kernel=3) if config.projects_fused else None
        self.conv_depth = _Out(width, config.hidden, config.bins.number)

    def forward(self, image: Tensor, tokens_of: TokensOf) -> Tensor:
        """Normalised pixels [B, 3, H, W], padded around to patches, to depth [B, 1, h, w].

        With an even number of patches down and across it is the depth of the padded image's pixels; else that map is
        stretched to 32 pixels per two patches. Nothing is cropped.
        """
        return depth_of(self.logits(tokens_of(centre_pad(image, _PATCH))), self.bins)

    def logits(self, taps: Sequence[Tap]) -> Tensor:
        """Four taps [B, h, w, D], from early to late, to [B, bins, 32 ceil(h / 2), 32 ceil(w / 2)]."""
        return self.conv_depth(self.fused(taps))

    def fused(self, taps: Sequence[Tap]) -> Tensor:
        """The map before the last convolutions, at half the size: [B, width, 16 ceil(h / 2), 16 ceil(w / 2)]."""
        levels = [conv(level) for conv, level in zip(self.convs, self.reassemble_blocks(taps), strict=True)]
        x = self.fusion_blocks[0](levels[3])
        for block, level in zip(self.fusion_blocks[1:], reversed(levels[:3]), strict=True):
            x = block(x, level)
        return x if self.project is None else F.relu(self.project(x))
