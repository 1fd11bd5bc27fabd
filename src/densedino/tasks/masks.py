"""Owns semantic segmentation with a released Mask2Former head: a picture in, a class at each of its pixels out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F

from densedino.errors import InputError
from densedino.heads.mask2former import semantic_map
from densedino.tasks.headed import Headed, images_of
from densedino.tasks.names import names_of
from densedino.tasks.sliding import classes_at, resized, slide

if TYPE_CHECKING:
    from torch import Tensor

    from densedino.images.transforms import Resize

__all__ = ["ClassMap", "SemanticSegmentor"]

_CROP, _STRIDE, _MULTIPLE = 896, 596, 32
_SCALES = (0.9, 0.95, 1.0, 1.05, 1.1)


@dataclass(frozen=True, eq=False)
class ClassMap:
    """The class of each pixel of one picture."""

    classes: Tensor
    """[H, W] uint8: places in `names`."""
    confidence: Tensor
    """[H, W] float32: how much the class is there; not calibrated."""
    names: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class SemanticSegmentor:
    """`dd.load("vit7b16-ade20k-m2f", …)`."""

    headed: Headed
    resize: Resize = None
    """None: as published, 896 pixels on the short side, in windows of 896, 596 apart."""
    crop: int = _CROP
    stride: int = _STRIDE

    def __post_init__(self) -> None:
        if self.crop < _MULTIPLE or self.crop % _MULTIPLE or not 0 < self.stride <= self.crop:
            raise InputError(
                f"crop {self.crop}, stride {self.stride}: windows are multiples of {_MULTIPLE} pixels, and at most as "
                f"far apart as they are wide; published are {_CROP} and {_STRIDE}."
            )

    @property
    def names(self) -> tuple[str, ...]:
        """Of the classes."""
        return names_of(self.headed.spec)

    def __call__(self, images: Any, *, augment: bool = False) -> list[ClassMap]:
        """Segment one image or several.

        Args:
            images: each is what `dd.load(…)` of a backbone takes.
            augment: average over five scales and their mirror images, as the published evaluation does; ten times the
                work.

        Raises:
            ImageError: an image that cannot be read.
        """
        return [self._one(image, augment=augment) for image in images_of(images)]

    def _one(self, image: Any, *, augment: bool) -> ClassMap:
        short = self.crop if self.resize is None else self.resize
        scales = _SCALES if augment and isinstance(short, int) else (1.0,)
        total: Tensor | None = None
        for scale in scales:
            pixels, size = self.headed.pixels_of(image, resize=_scaled(short, scale))
            said = self.of_pixels(pixels[None])
            if augment:
                said = said + self.of_pixels(pixels[None].flip(3)).flip(3)
            if len(scales) > 1:
                said = said.softmax(1)
            total = said if total is None else total + resized(said, (total.shape[2], total.shape[3]))
        assert total is not None
        classes, best = classes_at(total / (len(scales) * (1 + augment)), size)
        return ClassMap(classes, best, self.names)

    def of_pixels(self, pixels: Tensor) -> Tensor:
        """How much each class is at each pixel, [1, classes, H, W], of normalised pixels [1, 3, H, W]."""
        return slide(pixels, self._window, crop=self.crop, stride=self.stride)

    def _window(self, pixels: Tensor) -> Tensor:
        """Any size: zeros at the bottom and right fill the last stride."""
        H, W = pixels.shape[2:]
        padded = F.pad(pixels, (0, -W % _MULTIPLE, 0, -H % _MULTIPLE))
        out = self.headed.run(padded)
        with torch.no_grad():
            masks = F.interpolate(out["pred_masks"], size=padded.shape[2:], mode="bilinear")[:, :, :H, :W]
            return semantic_map(out["pred_logits"], masks)

    def raw(self, pixels: Tensor) -> dict[str, Any]:
        """The reference's output of normalised pixels [B, 3, H, W], H and W multiples of 32."""
        return cast("dict[str, Any]", self.headed.run(pixels))


def _scaled(size: Resize, scale: float) -> Resize:
    """Below 1, up to a multiple of 32, as published."""
    if scale == 1.0 or not isinstance(size, int):
        return size
    side = size * scale
    return math.ceil(side / _MULTIPLE) * _MULTIPLE if scale < 1 else int(side + 0.5)
