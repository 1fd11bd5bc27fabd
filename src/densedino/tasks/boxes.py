"""Owns object detection with a released Plain-DETR head: a picture in, boxes with classes and scores out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from densedino.errors import InputError
from densedino.heads.configs import DetectorConfig
from densedino.tasks.headed import Headed, decoded, images_of
from densedino.tasks.names import names_of

if TYPE_CHECKING:
    from torch import Tensor

    from densedino.images.transforms import Resize

__all__ = ["Found", "ObjectDetector"]

_LEAST, _MOST = 288, 2048  # pixels of the short and the long side: enough proposals; attention that is still to be had


@dataclass(frozen=True, eq=False)
class Found:
    """Objects in one picture, the surest first."""

    boxes: Tensor
    """[N, 4] float32, (x1, y1, x2, y2) in the picture's own pixels."""
    labels: Tensor
    """[N] int64: places in `names`; of COCO, its category ids."""
    scores: Tensor
    """[N], in [0, 1]."""
    names: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class ObjectDetector:
    """`dd.load("vit7b16-coco2017-detr", …)`."""

    headed: Headed
    resize: Resize = None
    """None: the picture's own size, made larger below 288 pixels and smaller above 2048."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of the classes; "" where COCO has no category of that id."""
        return names_of(self.headed.spec)

    def __call__(self, images: Any, *, threshold: float = 0.5) -> list[Found]:
        """Find objects in one image or several.

        Args:
            images: each is what `dd.load(…)` of a backbone takes.
            threshold: leave out what is less sure. The released head gives its 1500 best for 0.

        Raises:
            ImageError: an image that cannot be read.
        """
        if not 0 <= threshold <= 1:
            raise InputError(f"threshold {threshold}: scores are between 0 and 1.")
        return [self._one(image, threshold) for image in images_of(images)]

    def _one(self, image: Any, threshold: float) -> Found:
        source = decoded(image)
        height, width = source.array.shape[:2]
        pixels, _ = self.headed.pixels_of(source, resize=self._size(height, width))
        (found,) = self.headed.run([pixels])
        scale = torch.tensor([width / pixels.shape[2], height / pixels.shape[1]]).repeat(2)
        kept = found["scores"].cpu() >= threshold
        return Found(
            found["boxes"].cpu()[kept] * scale, found["labels"].cpu()[kept], found["scores"].cpu()[kept], self.names
        )

    def _size(self, height: int, width: int) -> Resize:
        if self.resize is not None:
            return self.resize
        config = self.headed.spec.config
        assert isinstance(config, DetectorConfig)
        scale = max(1.0, _LEAST / min(height, width))
        scale *= min(1.0, _MOST / (max(height, width) * scale))
        return None if scale == 1.0 else (round(height * scale), round(width * scale))
