"""Owns the typed result: tokens on their grid, which of them are real, and the exact map from tokens to pixels."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from densedino.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from densedino.engines.eager import LayerTokens

__all__ = ["Features", "Norm", "upsample_tokens"]

Norm = Literal["post", "pre"]


def _bilinear(tokens: int, pixels: int, length: float, stride: float, like: Tensor) -> Tensor:
    """Weights [pixels, tokens] of each output pixel centre between the two nearest token centres (edges held)."""
    centres = (torch.arange(pixels, device=like.device, dtype=torch.float64) + 0.5) * (length / pixels) / stride - 0.5
    centres = centres.clamp(0, tokens - 1)
    low = centres.floor().clamp(max=max(tokens - 2, 0))
    weights = torch.zeros(pixels, tokens, device=like.device, dtype=torch.float64)
    weights.scatter_(1, low.long()[:, None], (1 - (centres - low))[:, None])
    if tokens > 1:
        weights.scatter_(1, low.long()[:, None] + 1, (centres - low)[:, None])
    return weights.to(like.dtype)


def upsample_tokens(
    patches: Tensor, size: tuple[int, int], *, extent: tuple[float, float] | None = None, stride: float = 16
) -> Tensor:
    """Bilinear map from tokens to pixels, exact to the half pixel.

    Token (i, j) stands at the centre of its patch: pixel position ((i + ½)·stride, (j + ½)·stride) from the corner of
    the input. Output pixel (y, x) is read at ((y + ½)·H/size₀, (x + ½)·W/size₁); beyond the outermost centres the
    nearest token holds. Nothing is smoothed when `size` is smaller than the grid.

    Args:
        patches: [B, h, w, D].
        size: output height and width in pixels.
        extent: height and width (H, W) in input pixels that the output covers; the whole grid if not given.
        stride: input pixels per token.

    Returns:
        [B, D, *size]
    """
    height, width = patches.shape[1:3]
    covered = extent or (height * stride, width * stride)
    rows = _bilinear(height, size[0], covered[0], stride, patches)
    cols = _bilinear(width, size[1], covered[1], stride, patches)
    return torch.einsum("yh,bhwd,xw->bdyx", rows, patches, cols)


@dataclass(frozen=True)
class Features:
    """Dense features of B images.

    Images of different sizes stand in one tensor: each has its own grid in the top left corner, the rest is zero and
    not `valid`. `features[i]` is one image with its own grid.
    """

    patches: Tensor
    """[B, h, w, D] float32: one vector per patch; after the final norm unless `norm` says otherwise."""
    cls: Tensor
    """[B, D] float32."""
    registers: Tensor
    """[B, R, D] float32."""
    valid: Tensor
    """[B, h, w] bool: True where every pixel of the patch is of the image, not padding, nodata or transparent."""
    stride: int
    """Input pixels per patch."""
    grids: tuple[tuple[int, int], ...]
    """(h, w) of each image."""
    input_sizes: tuple[tuple[int, int], ...]
    """(H, W) of each image as the model saw it, before padding."""
    source_sizes: tuple[tuple[int, int], ...]
    """(H, W) of each image as decoded."""
    norm: Norm = "post"
    """Whether tokens are after (`post`) or before (`pre`) the model's final norm."""
    layers: dict[int, LayerTokens] = field(default_factory=dict)
    """Tokens of the blocks asked for, under the index asked for."""

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) of `patches`: of every image, if all have one size."""
        return self.patches.shape[1], self.patches.shape[2]

    def __len__(self) -> int:
        return self.patches.shape[0]

    def __iter__(self) -> Iterator[Features]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int) -> Features:
        """One image, B = 1, with its own grid."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")  # IndexError is what ends a for loop
        i = index % len(self)
        height, width = self.grids[i]
        layers = {}
        for number, tokens in self.layers.items():
            finer = tokens.patches.shape[1] // self.grid[0]
            layers[number] = replace(
                tokens,
                patches=tokens.patches[i : i + 1, : height * finer, : width * finer],
                cls=tokens.cls[i : i + 1],
                registers=tokens.registers[i : i + 1],
            )
        return replace(
            self,
            patches=self.patches[i : i + 1, :height, :width],
            cls=self.cls[i : i + 1],
            registers=self.registers[i : i + 1],
            valid=self.valid[i : i + 1, :height, :width],
            grids=self.grids[i : i + 1],
            input_sizes=self.input_sizes[i : i + 1],
            source_sizes=self.source_sizes[i : i + 1],
            layers=layers,
        )

    def upsample(self, size: tuple[int, int] | None = None) -> Tensor:
        """Patches as pixels: [B, D, H, W], bilinear and exact to the half pixel (see `upsample_tokens`).

        Args:
            size: (H, W) of the result, which covers each image without its padding; the model's input size if not
                given. Give `source_sizes[i]` for the pixels of the file.

        Raises:
            InputError: no `size`, and the images have different ones.
        """
        if size is None:
            if len(set(self.input_sizes)) != 1:
                raise InputError(
                    f"upsample() of images of {len(set(self.input_sizes))} sizes: give one size, or take features[i]."
                )
            size = self.input_sizes[0]
        if len(set(self.input_sizes)) == 1:
            return upsample_tokens(self.patches, size, extent=self.input_sizes[0], stride=self.stride)
        return torch.cat(
            [upsample_tokens(one.patches, size, extent=one.input_sizes[0], stride=self.stride) for one in self]
        )
