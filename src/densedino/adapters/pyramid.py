"""Owns heads that see four scales: FPN (Lin et al. 2017), UperNet (Xiao et al. 2018), DPT, and FPN on a ViT-Adapter.

A plain ViT has one scale: its four taps are resized to strides 4, 8, 16 and 32, as BEiT does for UperNet, or a
ViT-Adapter makes four maps of them and of the pixels. DPT and ViT-Adapter are the modules of the released heads, small.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from densedino.engines.eager import LayerTokens
from densedino.errors import InputError
from densedino.heads.bins import Bins
from densedino.heads.configs import AdapterConfig, DptConfig
from densedino.heads.dpt import Dpt
from densedino.heads.tapping import maps_of
from densedino.heads.vit_adapter import ViTAdapter

if TYPE_CHECKING:
    from collections.abc import Sequence

    from densedino.heads.tapping import Tap

__all__ = ["AdapterHead", "DptHead", "LevelHead", "PyramidHead"]

_POOLS = (1, 2, 3, 6)  # of UperNet's pyramid pooling, bins along a side


def _conv(dim: int, out: int, kernel: int) -> nn.Sequential:
    """With group norm, which does not care how small a batch is."""
    return nn.Sequential(
        nn.Conv2d(dim, out, kernel, padding=kernel // 2, bias=False), nn.GroupNorm(8, out), nn.ReLU(inplace=True)
    )


def _resize(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, size=like.shape[2:], mode="bilinear")


def _averages(x: Tensor, bins: int) -> Tensor:
    """`F.adaptive_avg_pool2d`, which ONNX has for fixed sizes only: [B, C, h, w] -> [B, C, bins, bins]."""
    rows, cols = (_shares(side, bins, x) for side in x.shape[2:])
    return rows @ x @ cols.T


def _shares(side: int, bins: int, like: Tensor) -> Tensor:
    """[bins, side]: the weight of each place in each bin; bins share a place that lies in both."""
    places = torch.arange(side, device=like.device)[None]
    ends = torch.arange(bins, device=like.device)[:, None] * side
    inside = (((places + 1) * bins > ends) & (places * bins < ends + side)).to(like.dtype)
    return inside / inside.sum(1, keepdim=True)


class PyramidHead(nn.Module):
    """Four taps to logits at a quarter of the pixels: [B, out, H / 4, W / 4]."""

    def __init__(self, dims: Sequence[int], *, width: int, out: int, pools: bool, natural: bool) -> None:
        """`natural`: the taps have strides 4, 8, 16, 32 already, as a ConvNeXt's stages do."""
        super().__init__()
        first, second, _, last = dims
        self.resize = nn.ModuleList([nn.Identity() for _ in dims])
        if not natural:
            self.resize[0] = nn.Sequential(
                nn.ConvTranspose2d(first, first, 2, stride=2), nn.GELU(), nn.ConvTranspose2d(first, first, 2, stride=2)
            )
            self.resize[1] = nn.ConvTranspose2d(second, second, 2, stride=2)
            self.resize[3] = nn.Conv2d(last, last, 3, stride=2, padding=1)
        self.levels = LevelHead(dims, width=width, out=out, pools=pools)

    def forward(self, taps: Sequence[Tap], pixels: Tensor | None = None) -> Tensor:
        """Taps from early to late."""
        return self.levels([resize(m) for resize, m in zip(self.resize, maps_of(taps), strict=True)])


class LevelHead(nn.Module):
    """Four maps of falling size to logits at the size of the first."""

    def __init__(self, dims: Sequence[int], *, width: int, out: int, pools: bool) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(_conv(dim, width, 1) for dim in (dims[:-1] if pools else dims))
        self.pools = nn.ModuleList(_conv(dims[-1], width, 1) for _ in _POOLS if pools)
        self.bottleneck = _conv(dims[-1] + width * len(_POOLS), width, 3) if pools else None
        self.smooth = nn.ModuleList(_conv(width, width, 3) for _ in dims)
        self.fuse = _conv(4 * width, width, 3) if pools else None
        self.classify = nn.Conv2d(width, out, kernel_size=1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """[B, D, h, w] each, the largest first."""
        x = self._deepest(maps[-1])
        levels = [x]
        for lateral, level in zip(reversed(self.lateral[:3]), reversed(maps[:-1]), strict=True):
            own = lateral(level)
            x = own + _resize(x, own)
            levels.append(x)
        levels = [smooth(level) for smooth, level in zip(self.smooth, reversed(levels), strict=True)]
        levels = [levels[0], *(_resize(level, levels[0]) for level in levels[1:])]
        joined = torch.stack(levels).sum(0) if self.fuse is None else self.fuse(torch.cat(levels, dim=1))
        return self.classify(joined)

    def _deepest(self, x: Tensor) -> Tensor:
        if self.bottleneck is None:
            return self.lateral[-1](x)
        context = [_resize(conv(_averages(x, bins)), x) for conv, bins in zip(self.pools, _POOLS, strict=True)]
        return self.bottleneck(torch.cat([x, *context], dim=1))


class DptHead(nn.Module):
    """Four taps to logits at 32 places per two patches: [B, out, 32 ceil(h / 2), 32 ceil(w / 2)]."""

    def __init__(self, dim: int, *, width: int, out: int) -> None:
        super().__init__()
        widths = (width // 2, width, 2 * width, 2 * width)
        config = DptConfig(
            reassembled=widths, width=width, hidden=32, bins=Bins(number=out, most=1.0), norms_inputs=True
        )
        self.dpt = Dpt(dim, config)

    def forward(self, taps: Sequence[Tap], pixels: Tensor | None = None) -> Tensor:
        """Taps from early to late."""
        return self.dpt.logits(taps)


class AdapterHead(nn.Module):
    """Pixels and four taps, through a ViT-Adapter and an FPN, to logits at a quarter of the pixels."""

    needs_pixels = True

    def __init__(self, dim: int, *, width: int, out: int) -> None:
        super().__init__()
        self.adapter = ViTAdapter(dim, AdapterConfig(stem=width // 4, heads=max(1, dim // 64)))
        self.levels = LevelHead([dim] * 4, width=width, out=out, pools=False)

    def forward(self, taps: Sequence[Tap], pixels: Tensor | None = None) -> Tensor:
        """Taps from early to late, and [B, 3, H, W]; what is no multiple of 32 is continued at the bottom and right.

        Exported graphs do not continue: there H and W are multiples of 32.
        """
        if pixels is None:
            raise InputError("head 'vit-adapter' looks at the pixels too, so stored features alone do not do.")
        height, width = taps[0].patches.shape[1:3]
        if not torch.compiler.is_compiling() and (height % 2 or width % 2):
            more = (0, width % 2, 0, height % 2)
            pixels = F.pad(pixels, [16 * n for n in more], mode="replicate")
            taps = [_continued(tap, more) for tap in taps]
        made = self.adapter(pixels, taps)
        return self.levels([torch.cat(list(made.fine), dim=2), *made.coarse])[:, :, : 4 * height, : 4 * width]


def _continued(tap: Tap, more: tuple[int, int, int, int]) -> LayerTokens:
    patches = F.pad(tap.patches.permute(0, 3, 1, 2), more, mode="replicate").permute(0, 2, 3, 1)
    return LayerTokens(patches, tap.cls, tap.registers)
