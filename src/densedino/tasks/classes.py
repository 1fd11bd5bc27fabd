"""Owns image classification with a released linear head: a picture in, names with probabilities out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from densedino.tasks.headed import Headed, images_of
from densedino.tasks.names import names_of

if TYPE_CHECKING:
    from torch import Tensor

    from densedino.images.transforms import Resize

__all__ = ["Classes", "Classifier", "centre_crop"]

_SHORT_SIDE, _CROP = 256, 224


@dataclass(frozen=True, eq=False)
class Classes:
    """How probable each class is, of one picture."""

    probabilities: Tensor
    """[classes], summing to 1."""
    names: tuple[str, ...]

    def top(self, count: int = 5) -> list[tuple[str, float]]:
        """The most probable classes, best first."""
        best = self.probabilities.topk(min(count, len(self.names)))
        return [(self.names[i], p) for i, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)]


@dataclass(frozen=True, eq=False)
class Classifier:
    """`dd.load("vit7b16-imagenet1k-linear", …)`."""

    headed: Headed
    resize: Resize = None
    """None: as published, 256 pixels on the short side, the 224 in the middle. (H, W): exactly that."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of the classes."""
        return names_of(self.headed.spec)

    def __call__(self, images: Any) -> list[Classes]:
        """Classify one image or several; each is what `dd.load(…)` of a backbone takes.

        Raises:
            ImageError: an image that cannot be read.
        """
        return [self._one(image) for image in images_of(images)]

    def _one(self, image: Any) -> Classes:
        short = self.resize is None
        pixels, _ = self.headed.pixels_of(
            image, resize=_SHORT_SIDE if short else self.resize, interpolation="bicubic" if short else "bilinear"
        )
        logits = self.headed.run(centre_crop(pixels, _CROP if short else 16)[None])
        return Classes(logits[0].softmax(-1).cpu(), self.names)


def centre_crop(pixels: Tensor, side: int) -> Tensor:
    """The middle of [3, H, W]: `side` by `side`, or for 16 the largest multiples of it."""
    H, W = pixels.shape[1:]
    height, width = (side, side) if side > 16 else (H // 16 * 16, W // 16 * 16)
    top, left = round((H - height) / 2), round((W - width) / 2)
    return pixels[:, top : top + height, left : left + width]
