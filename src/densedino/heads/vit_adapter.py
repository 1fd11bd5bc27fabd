"""Owns ViT-Adapter without injectors (after Chen et al. 2023): tokens of a frozen plain ViT to a pyramid of maps.

The backbone runs once and is never changed; a small convolutional stem brings what is finer than its patches.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from densedino.errors import InputError
from densedino.heads.deformable import DeformableAttention, cell_centres
from densedino.heads.tapping import maps_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from densedino.heads.configs import AdapterConfig
    from densedino.heads.tapping import Tap

__all__ = ["Pyramid", "SpatialPrior", "ViTAdapter"]

_EPS = 1e-6
_STRIP_BYTES = 1 << 27
Shapes = tuple[tuple[int, int], ...]


def _block(dim: int, out: int, *, stride: int) -> list[nn.Module]:
    return [
        nn.Conv2d(dim, out, kernel_size=3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(out),
        nn.ReLU(inplace=True),
    ]


class SpatialPrior(nn.Module):
    """Convolutions from pixels to maps at strides 4, 8, 16 and 32, each mapped to the tokens' width."""

    def __init__(self, dim: int, *, width: int) -> None:
        super().__init__()
        w = width
        self.stem = nn.Sequential(
            *_block(3, w, stride=2),
            *_block(w, w, stride=1),
            *_block(w, w, stride=1),
            nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
        )
        self.conv2 = nn.Sequential(*_block(w, 2 * w, stride=2))
        self.conv3 = nn.Sequential(*_block(2 * w, 4 * w, stride=2))
        self.conv4 = nn.Sequential(*_block(4 * w, 4 * w, stride=2))
        self.fc1 = nn.Conv2d(w, dim, kernel_size=1)
        self.fc2 = nn.Conv2d(2 * w, dim, kernel_size=1)
        self.fc3 = nn.Conv2d(4 * w, dim, kernel_size=1)
        self.fc4 = nn.Conv2d(4 * w, dim, kernel_size=1)

    def forward(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        """[B, 3, H, W] to the map at stride 4 before `fc1`, [B, width, H / 4, W / 4], and the other maps, of D."""
        c1 = self.stem(image)
        c2 = self.conv2(c1)
        c3 = self.conv3(c2)
        return c1, [self.fc2(c2), self.fc3(c3), self.fc4(self.conv4(c3))]


class _DepthwiseConv(nn.Module):
    """One 3x3 convolution per channel, on each of the three grids that the tokens come from."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim)

    def forward(self, tokens: Tensor, shapes: Shapes) -> Tensor:
        parts = tokens.split([h * w for h, w in shapes], dim=1)
        maps = [part.transpose(1, 2).unflatten(2, shape) for part, shape in zip(parts, shapes, strict=True)]
        return torch.cat([self.dwconv(m).flatten(2).transpose(1, 2) for m in maps], dim=1)


class _ConvFfn(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = _DepthwiseConv(hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, tokens: Tensor, shapes: Shapes) -> Tensor:
        return self.fc2(F.gelu(self.dwconv(self.fc1(tokens), shapes)))


class _Extractor(nn.Module):
    """The pyramid's tokens take from the backbone's."""

    def __init__(self, dim: int, config: AdapterConfig) -> None:
        super().__init__()
        self.query_norm = nn.LayerNorm(dim, eps=_EPS)
        self.feat_norm = nn.LayerNorm(dim, eps=_EPS)
        self.attn = DeformableAttention(dim, heads=config.heads, levels=1, points=config.points, ratio=config.ratio)
        self.ffn = _ConvFfn(dim, int(dim * config.ffn_ratio))
        self.ffn_norm = nn.LayerNorm(dim, eps=_EPS)

    def forward(self, tokens: Tensor, tap: Tap, reference: Tensor, shapes: Shapes) -> Tensor:
        grid = (tap.patches.shape[1], tap.patches.shape[2])
        values = self.feat_norm(tap.patches.flatten(1, 2))
        tokens = tokens + self.attn(self.query_norm(tokens), reference, values, (grid,))
        return tokens + self.ffn(self.ffn_norm(tokens), shapes)


class _Interaction(nn.Module):
    def __init__(self, dim: int, config: AdapterConfig, *, extra: int) -> None:
        super().__init__()
        self.extractor = _Extractor(dim, config)
        if extra:
            self.extra_extractors = nn.ModuleList(_Extractor(dim, config) for _ in range(extra))

    def forward(self, tokens: Tensor, tap: Tap, reference: Tensor, shapes: Shapes) -> Tensor:
        for extractor in (self.extractor, *getattr(self, "extra_extractors", ())):
            tokens = extractor(tokens, tap, reference, shapes)
        return tokens


class Pyramid(NamedTuple):
    """Maps of one width at strides 4, 8, 16 and 32."""

    fine: Iterable[Tensor]
    """[B, D, H / 4, W / 4] in strips of rows from top to bottom, made one by one as they are asked for, once: the whole
    map of a wide backbone is the largest tensor by far."""
    coarse: tuple[Tensor, Tensor, Tensor]
    """[B, D, H / s, W / s] for s of 8, 16, 32."""


class ViTAdapter(nn.Module):
    """Pixels and the taps of four blocks to maps of D channels at strides 4, 8, 16 and 32."""

    def __init__(self, dim: int, config: AdapterConfig) -> None:
        super().__init__()
        self.level_embed = nn.Parameter(torch.zeros(3, dim))
        self.spm = SpatialPrior(dim, width=config.stem)
        self.interactions = nn.ModuleList(_Interaction(dim, config, extra=2 * (i == 3)) for i in range(4))
        self.up = nn.ConvTranspose2d(dim, dim, kernel_size=2, stride=2)
        self.norm1 = nn.BatchNorm2d(dim)
        self.norm2 = nn.BatchNorm2d(dim)
        self.norm3 = nn.BatchNorm2d(dim)
        self.norm4 = nn.BatchNorm2d(dim)

    def forward(self, image: Tensor, taps: Sequence[Tap]) -> Pyramid:
        """Pixels and tokens to a pyramid.

        Args:
            image: [B, 3, H, W], normalised.
            taps: of four blocks, from early to late; patches [B, H / 16, W / 16, D].

        Raises:
            InputError: H or W is no multiple of 32.
        """
        H, W = image.shape[2:]
        if not torch.compiler.is_compiling() and (H % 32 or W % 32):
            raise InputError(
                f"an image of {H}×{W} pixels: this head needs a height and a width that are multiples of 32, for its "
                "coarsest map. Pad or resize it."
            )
        stem, pyramid = self.spm(image)
        shapes = tuple((m.shape[2], m.shape[3]) for m in pyramid)
        tokens = torch.cat(
            [m.flatten(2).transpose(1, 2) + level for m, level in zip(pyramid, self.level_embed, strict=True)], dim=1
        )
        del pyramid
        reference = cell_centres(shapes, device=image.device)[None, :, None].expand(len(image), -1, -1, -1)
        for interaction, tap in zip(self.interactions, taps, strict=True):
            tokens = interaction(tokens, tap, reference, shapes)
        parts = tokens.split([h * w for h, w in shapes], dim=1)
        c2, c3, c4 = (part.transpose(1, 2).unflatten(2, s) for part, s in zip(parts, shapes, strict=True))
        x1, x2, x3, x4 = maps_of(taps)
        coarse = (
            self.norm2(c2 + F.interpolate(x2, size=c2.shape[2:], mode="bilinear")),
            self.norm3(c3 + F.interpolate(x3, size=c3.shape[2:], mode="bilinear")),
            self.norm4(c4 + F.interpolate(x4, size=c4.shape[2:], mode="bilinear")),
        )
        return Pyramid(self._fine(stem, c2, x1), coarse)

    def _fine(self, stem: Tensor, c2: Tensor, x1: Tensor) -> Iterator[Tensor]:
        """Strips of the map at stride 4, from the maps at strides 4, 8 and 16."""
        rows, width = x1.shape[2], stem.shape[3]
        step = rows  # batch norm in training counts over all; a graph has no size to choose by
        if not self.training and not torch.compiler.is_compiling():
            step = max(1, _STRIP_BYTES // (4 * width * x1.shape[1] * 4 * len(x1)))
        for top in range(0, rows, step):
            end = min(top + step, rows)
            c1 = self.up(c2[:, :, 2 * top : 2 * end])  # what is added to it is added in place: it is large
            c1 += self.spm.fc1(stem[:, :, 4 * top : 4 * end])
            first, last = max(top - 1, 0), min(end + 1, rows)  # the rows around, which interpolation sees
            around = F.interpolate(x1[:, :, first:last], size=(4 * (last - first), width), mode="bilinear")
            c1 += around[:, :, 4 * (top - first) : 4 * (end - first)]
            del around
            yield self.norm1(c1)
