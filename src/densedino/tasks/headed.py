"""Owns a backbone, run by any engine, with a released head on it: how the head gets its tokens and its pixels."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch

from densedino.engines.streamed import StreamEngine
from densedino.images.decoding import Pixels, read_image
from densedino.images.transforms import Transform

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from densedino.engines.eager import LayerTokens
    from densedino.engines.protocol import Engine
    from densedino.heads.catalog import HeadSpec
    from densedino.images.transforms import Resize
    from densedino.weights.card import WeightsCard

__all__ = ["Headed", "decoded", "images_of"]


@dataclass(frozen=True, eq=False)
class Headed:
    """A head on its backbone."""

    spec: HeadSpec
    head: nn.Module
    """In eval mode, on the engine's device; with `engine='stream'` its large tensors are in the file."""
    engine: Engine
    card: WeightsCard
    """Of the backbone's weights."""
    source: str
    """Of the head's weights."""
    sha256: str
    notes: tuple[str, ...] = ()
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    """Held while the head runs: one that is read layer by layer can do so for one caller at a time."""

    @property
    def untrained(self) -> bool:
        """True if the head or the backbone is random: answers are noise."""
        return self.source == "random" or self.card.untrained

    def tokens_of(self, pixels: Tensor) -> list[LayerTokens]:
        """Tokens of the blocks that the head taps, of normalised pixels [B, 3, H, W]."""
        layers = sorted(set(self.spec.layers))
        tokens = dict(zip(layers, self.engine(pixels, layers=layers, norm=True), strict=True))
        if isinstance(self.engine, StreamEngine):
            self.engine._make_buffers(0)  # what blocks were read into is the head's now
        return [tokens[layer] for layer in self.spec.layers]

    def run(self, pixels: Any) -> Any:
        """What the head says of normalised pixels; as the reference's module, without gradients."""
        with self.lock, torch.no_grad():
            return self.head(pixels, self.tokens_of)

    def pixels_of(
        self, image: Any, *, resize: Resize = None, interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    ) -> tuple[Tensor, tuple[int, int]]:
        """A picture, normalised by the head's statistics, and resized: [3, H, W], and its own size (H, W).

        Raises:
            ImageError: a picture that cannot be read or used.
        """
        source = decoded(image)
        transform = Transform(
            mean=self.spec.mean, std=self.spec.std, stride=1, resize=resize, interpolation=interpolation
        )
        prepared = transform(source)
        return prepared.pixels.to(self.engine.device), prepared.source_size

    def __str__(self) -> str:
        untrained = ", UNTRAINED" if self.untrained else ""
        return f"{self.spec.name}{untrained} on {self.card.name}, {self.engine.name}, {self.engine.precision}"


def decoded(image: Any) -> Pixels:
    """A picture of any kind, read; `Pixels` are that already."""
    return image if isinstance(image, Pixels) else read_image(image)


def images_of(images: Any) -> Sequence[Any]:
    """One image or several, as several."""
    return images if isinstance(images, list | tuple) else [images]
