"""Owns depth and canopy height with a released DPT head: a picture in, metres at each of its pixels out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from densedino.heads.configs import DptConfig
from densedino.tasks.headed import Headed, images_of
from densedino.tasks.sliding import resized, slide

if TYPE_CHECKING:
    from torch import Tensor

    from densedino.heads.bins import Bins
    from densedino.images.transforms import Resize

__all__ = ["DepthEstimator", "DepthMap"]

_SIDE = 768
_WINDOW, _STRIDE = 1024, 768


@dataclass(frozen=True, eq=False)
class DepthMap:
    """Depth, or height, of one picture."""

    metres: Tensor
    """[H, W] float32, of the picture's own pixels."""
    bins: Bins
    """The range that the head can tell."""


@dataclass(frozen=True, eq=False)
class DepthEstimator:
    """`dd.load("vit7b16-synthmix-dpt", …)`, and `dd.load("vitl16-chmv2-dpt", …)` for canopy height."""

    headed: Headed
    resize: Resize = None
    """None: as published, a square of 768 pixels for depth, the picture's own size for canopy height."""

    @property
    def is_height(self) -> bool:
        """True for height above the ground seen from above, False for distance from the camera."""
        return self._config.bins.spacing == "mixlog"

    @property
    def _config(self) -> DptConfig:
        config = self.headed.spec.config
        assert isinstance(config, DptConfig)
        return config

    def __call__(self, images: Any, *, flip: bool = False) -> list[DepthMap]:
        """Depth of one image or several.

        Args:
            images: each is what `dd.load(…)` of a backbone takes.
            flip: average with the mirrored picture's, as the published evaluation does.

        Raises:
            ImageError: an image that cannot be read.
        """
        return [self._one(image, flip=flip) for image in images_of(images)]

    def _one(self, image: Any, *, flip: bool) -> DepthMap:
        default: Resize = None if self.is_height else (_SIDE, _SIDE)
        pixels, size = self.headed.pixels_of(image, resize=default if self.resize is None else self.resize)
        depth = self.of_pixels(pixels[None])
        if flip:
            depth = (depth + self.of_pixels(pixels[None].flip(3)).flip(3)) / 2
        return DepthMap(resized(depth, size)[0, 0].cpu(), self._config.bins)

    def of_pixels(self, pixels: Tensor) -> Tensor:
        """Metres [1, 1, H, W] of normalised pixels [1, 3, H, W]; of a large picture in overlapping windows."""
        if max(pixels.shape[2:]) > 2 * _WINDOW:
            return slide(pixels, self._window, crop=_WINDOW, stride=_STRIDE)
        return self._window(pixels)

    def _window(self, pixels: Tensor) -> Tensor:
        """The head pads around to patches: what it says is brought to the padded size, and the padding cut off.

        With an odd number of patches its map is that of the padded picture, stretched.
        """
        H, W = pixels.shape[2:]
        height, width = (math.ceil(side / 16) * 16 for side in (H, W))
        padded = resized(self.headed.run(pixels), (height, width))
        top, left = (height - H) // 2, (width - W) // 2
        return padded[:, :, top : top + H, left : left + W]
