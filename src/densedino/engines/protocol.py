"""Owns what every engine offers, whatever runs the numbers; no engine inherits from another."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import Tensor

    from densedino.engines.eager import LayerTokens
    from densedino.models.convnext import ConvNeXt
    from densedino.models.vit import VisionTransformer

__all__ = ["Engine"]


class Engine(Protocol):
    """Pixels of one size in, tokens of the asked blocks out; no gradients. Any number of threads may call it."""

    @property
    def name(self) -> str:
        """As in `dd.load(engine=…)`."""

    @property
    def model(self) -> VisionTransformer | ConvNeXt:
        """The backbone, whose parameters may be on meta where the engine holds the weights itself."""

    @property
    def device(self) -> torch.device:
        """Where tokens come out."""

    @property
    def precision(self) -> str:
        """Of matrix products: fp32, bf16, int8 or int4."""

    def __call__(self, pixels: Tensor, *, layers: Sequence[int] = (-1,), norm: bool = True) -> list[LayerTokens]:
        """Run [B, C, H, W] (H and W multiples of the stride) and return the blocks `layers`, in that order, float32.

        Raises:
            InputError: the input or an index does not fit the model.
        """
