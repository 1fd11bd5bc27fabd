"""Owns what a head sees of a backbone: the tokens of the blocks that it taps, from whatever runs the backbone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from densedino.models.vit import VisionTransformer

__all__ = ["Tap", "TokensOf", "backbone_taps", "centre_pad", "maps_of"]


class Tap(Protocol):
    """Tokens of one block after the backbone's final norm; what every engine returns is one."""

    @property
    def patches(self) -> Tensor:
        """[B, h, w, D]."""

    @property
    def cls(self) -> Tensor:
        """[B, D]."""

    @property
    def registers(self) -> Tensor:
        """[B, R, D]."""


TokensOf = Callable[[Tensor], Sequence[Tap]]
"""Normalised pixels [B, C, H, W] to the tokens of the blocks that a head taps, in its order."""


class _Tokens:
    def __init__(self, patches: Tensor, cls: Tensor, registers: Tensor) -> None:
        self.patches, self.cls, self.registers = patches, cls, registers


def backbone_taps(backbone: VisionTransformer, layers: Sequence[int]) -> TokensOf:
    """The taps of a plain module, with gradients; engines have a call of their own."""

    def tokens_of(pixels: Tensor) -> list[Tap]:
        height, width = backbone.grid_size(pixels)
        blocks = backbone.get_intermediate_layers(
            pixels, n=list(layers), return_class_token=True, return_extra_tokens=True
        )
        return [_Tokens(patches.unflatten(1, (height, width)), cls, registers) for patches, cls, registers in blocks]

    return tokens_of


def maps_of(taps: Sequence[Tap]) -> list[Tensor]:
    """Patch tokens as maps [B, D, h, w]."""
    return [tap.patches.permute(0, 3, 1, 2) for tap in taps]


def centre_pad(image: Tensor, multiple: int) -> Tensor:
    """Zeros around [B, C, H, W] up to the next multiple; of an odd number of them the larger half at the end."""
    height, width = (-side % multiple for side in image.shape[-2:])
    return F.pad(image, (width // 2, width - width // 2, height // 2, height - height // 2))
