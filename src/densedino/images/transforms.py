"""Owns the way from a picture to the tensor that the weights were trained to see."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np
import torch
import torch.nn.functional as F

from densedino.errors import ImageError, InputError
from densedino.images.decoding import MAX_PIXELS, Pixels, read_image

if TYPE_CHECKING:
    from densedino.images.decoding import ImageSource

__all__ = ["Fit", "Geometry", "Prepared", "Resize", "Transform"]

Size = tuple[int, int]
Resize = int | Size | None
Fit = Literal["pad", "crop", "resize", "error"]
Interpolation = Literal["bilinear", "bicubic"]
Rounding = Literal["uint8", "none"]

VERSION = 1
"""Part of the fingerprint: raise it when the same fields begin to give other pixels."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Prepared:
    """A picture as the model takes it."""

    pixels: torch.Tensor
    """[C,H,W] float32, normalised; H and W are multiples of the stride."""
    valid: torch.Tensor
    """[h,w] bool: True for a patch all of whose pixels are real (not padding, not transparent, not masked)."""
    source_size: Size
    """(H, W) as decoded, upright."""
    input_size: Size
    """(H, W) after resizing and cropping, before padding: the part of `pixels` that shows the picture."""


class Geometry(NamedTuple):
    """What becomes of a picture's size."""

    resized: Size
    """(H, W) to which the whole picture is scaled; the source's own if it is not."""
    input_size: Size
    """(H, W) of what is kept of it: smaller than `resized` only with fit="crop"."""
    grid: Size
    """(h, w) patches: `input_size` divided by the stride, rounded up."""


@dataclass(frozen=True)
class Transform:
    """How pictures are made to fit one set of weights. Comes with the weights; `dataclasses.replace` for a variant.

    The fields say everything: equal fields give equal pixels.
    """

    mean: tuple[float, ...]
    """Per channel, of values in [0, 1]. As many as the model has input channels."""
    std: tuple[float, ...]
    stride: int = 16
    """Pixels from one token to the next."""
    resize: Resize = None
    """None: native size. An integer: that many pixels on the short side, aspect kept. (H, W): exactly that."""
    fit: Fit = "pad"
    """What if the size is no multiple of the stride. pad: at the bottom and right, with the edge colours, and the
    patches concerned are not `valid`. crop: the bottom and right remainder is dropped (the released code does so
    without a word). resize: to the nearest multiple. error: say so."""
    interpolation: Interpolation = "bilinear"
    """Always antialiased."""
    max_tokens: int | None = None
    """Larger pictures are scaled down, aspect kept, until they have at most that many patches."""
    max_value: float | None = None
    """The value that means white in 16-bit and float sources; see `read_image`."""
    rounding: Rounding = "uint8"
    """Whether an 8-bit picture has whole grey levels again after it was resized."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", tuple(map(float, self.mean)))  # lists compare and hash differently
        object.__setattr__(self, "std", tuple(map(float, self.std)))
        if not isinstance(self.resize, int | None):
            object.__setattr__(self, "resize", tuple(self.resize))
        if not self.mean or len(self.mean) != len(self.std) or min(self.std) <= 0:
            raise InputError(f"mean={self.mean} and std={self.std} must have one value per channel, std above 0.")
        if not all(0 <= mean <= 1 for mean in self.mean):
            raise InputError(
                f"mean={self.mean} is not in [0, 1]. Divide mean and std by 255 if they are in grey levels."
            )
        sides = self.resize if isinstance(self.resize, tuple) else (self.resize, self.resize)
        if len(sides) != 2 or any(n is not None and n < 1 for n in (*sides, self.stride, self.max_tokens)):
            raise InputError(
                f"resize={self.resize}, stride={self.stride}, max_tokens={self.max_tokens}: sizes must be positive, "
                "and resize an integer (short side) or (height, width)."
            )
        for field, valid in (("fit", Fit), ("interpolation", Interpolation), ("rounding", Rounding)):
            if getattr(self, field) not in get_args(valid):
                raise InputError(f"{field}={getattr(self, field)!r} is not one of {', '.join(get_args(valid))}.")

    @property
    def in_chans(self) -> int:
        """Channels of the tensor."""
        return len(self.mean)

    def preset(self, name: Literal["native", "reference", "huggingface"]) -> Transform:
        """Take the sizes of a well-known pipeline.

        native: the picture's own size, padded: the default. reference: the README of the released weights, a
        square 256 on whole grey levels. huggingface: the processor in `transformers`, a square 224 in floats.

        Raises:
            InputError: no such preset.
        """
        if name == "native":
            return replace(self, resize=None, fit="pad", interpolation="bilinear", max_tokens=None)
        if name == "reference":
            return replace(self, resize=(256, 256), interpolation="bilinear", max_tokens=None, rounding="uint8")
        if name == "huggingface":
            return replace(self, resize=(224, 224), interpolation="bilinear", max_tokens=None, rounding="none")
        raise InputError(f"unknown preset {name!r}. Valid: native, reference, huggingface.")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, ready for JSON; `Transform(**fields)` is the same transform."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    def fingerprint(self) -> str:
        """64 hex digits: equal if, and only if, the fields and this module's version are."""
        text = json.dumps({**self.to_dict(), "version": VERSION}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def geometry(self, height: int, width: int) -> Geometry:
        """Tell what becomes of a picture of that size.

        Raises:
            ImageError: it has not one whole patch, or is no multiple of the stride and fit is "error".
        """
        size = self._scaled_size(height, width)
        if self.max_tokens is not None and self._tokens(size) > self.max_tokens:
            size = self._shrunk(size, self.max_tokens)
        if min(size) < self.stride:
            raise ImageError(
                f"{height}×{width} pixels (H×W)"
                + (f", resized to {size[0]}×{size[1]}," if size != (height, width) else "")
                + f" is smaller than one {self.stride}×{self.stride} patch. Fix: leave it out, or change "
                + ("resize=." if self.max_tokens is None else "resize= or max_tokens=.")
            )
        if self.fit == "error" and (size[0] % self.stride or size[1] % self.stride):
            near = [f"{h}×{w}" for h in self._near(size[0]) for w in self._near(size[1])]
            raise ImageError(
                f"{size[0]}×{size[1]} pixels (H×W) is no multiple of {self.stride}, and fit is 'error'. Nearest: "
                f"{', '.join(dict.fromkeys(near))}. Or fit='pad', 'crop', 'resize'."
            )
        kept = size
        if self.fit == "resize":
            size = kept = self._rounded(size)
        elif self.fit == "crop":
            kept = (size[0] // self.stride * self.stride, size[1] // self.stride * self.stride)
        if size != (height, width) and size[0] * size[1] > MAX_PIXELS:
            raise ImageError(
                f"{height}×{width} pixels (H×W) would become {size[0]}×{size[1]}, too many. Fix: max_tokens=."
            )
        return Geometry(size, kept, (math.ceil(kept[0] / self.stride), math.ceil(kept[1] / self.stride)))

    def _scaled_size(self, height: int, width: int) -> Size:
        if self.resize is None:
            return height, width
        if isinstance(self.resize, tuple):
            return self.resize
        short = min(height, width)
        # Truncated, not rounded, as torchvision does for the long side.
        return int(self.resize * height / short), int(self.resize * width / short)

    def _near(self, side: int) -> tuple[int, int]:
        below = max(side // self.stride, 1) * self.stride
        return below, math.ceil(side / self.stride) * self.stride

    def _rounded(self, size: Size) -> Size:
        height, width = (max(1, round(side / self.stride)) * self.stride for side in size)
        return height, width

    def _tokens(self, size: Size) -> int:
        if self.fit == "resize":
            size = self._rounded(size)
        up = 0 if self.fit == "crop" else self.stride - 1
        return ((size[0] + up) // self.stride) * ((size[1] + up) // self.stride)

    def _shrunk(self, size: Size, max_tokens: int) -> Size:
        """Find the largest size of the same aspect with at most `max_tokens`; tokens grow with the scale."""

        def at(scale: float) -> Size:
            return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))

        low, high = 0.0, 1.0
        for _ in range(32):
            middle = (low + high) / 2
            low, high = (middle, high) if self._tokens(at(middle)) <= max_tokens else (low, middle)
        return at(low)

    def __call__(self, source: ImageSource | Pixels) -> Prepared:
        """Read `source` (see `read_image`; or `Pixels` that were read before) and make it fit the weights.

        Transparent and masked pixels become the mean colour, 0 after normalisation, before anything is resized.

        Raises:
            ImageError: not a usable picture, or not of a usable size.
        """
        pixels = source
        if not isinstance(pixels, Pixels):
            pixels = read_image(pixels, in_chans=self.in_chans, max_value=self.max_value)
        height, width, channels = pixels.array.shape
        if channels != self.in_chans:
            raise ImageError(f"{pixels.name} was read with {channels} channels; the weights take {self.in_chans}.")
        try:
            resized, (kept_h, kept_w), (h, w) = self.geometry(height, width)
        except ImageError as error:
            raise ImageError(f"{pixels.name}: {error}") from None

        image, real = self._resized(pixels, resized)
        image = self._normalised(image[:, :kept_h, :kept_w], pixels.max_value)
        if real is not None:
            real = real[:kept_h, :kept_w]
            image.masked_fill_(~real, 0.0)
        self.check(image, name=pixels.name)
        padding = (0, w * self.stride - kept_w, 0, h * self.stride - kept_h)
        if any(padding):
            image = F.pad(image, padding, mode="replicate")
        if real is None:
            valid = torch.zeros(h, w, dtype=torch.bool)
            valid[: kept_h // self.stride, : kept_w // self.stride] = True
        else:
            valid = F.pad(real, padding, value=False).view(h, self.stride, w, self.stride).all(3).all(1)
        return Prepared(pixels=image, valid=valid, source_size=(height, width), input_size=(kept_h, kept_w))

    def _resized(self, pixels: Pixels, size: Size) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[C,H,W] of `size` in the values of the source, and the mask [H,W] of what only real pixels went into."""
        array, real = pixels.array, None
        if pixels.valid is not None:
            fill = np.asarray(self.mean) * pixels.max_value
            array = np.where(pixels.valid[..., None], array, fill if array.dtype.kind == "f" else fill.round())
            array = array.astype(pixels.array.dtype)
            real = torch.from_numpy(pixels.valid)
        image = torch.from_numpy(array).permute(2, 0, 1)
        if size == image.shape[1:]:
            return image, real
        if image.dtype != torch.uint8 or self.rounding == "none":
            image = image.float()
        image = self._interpolated(image, size)
        if image.dtype == torch.float32:
            image.clamp_(0, pixels.max_value)  # bicubic overshoots
        if real is not None:
            real = (self._interpolated(real[None].float(), size)[0] - 1).abs() < 1e-3
        return image, real

    def _interpolated(self, image: torch.Tensor, size: Size) -> torch.Tensor:
        return F.interpolate(image[None], size=size, mode=self.interpolation, antialias=True)[0]

    def _normalised(self, image: torch.Tensor, max_value: float) -> torch.Tensor:
        mean, std = torch.tensor(self.mean)[:, None, None], torch.tensor(self.std)[:, None, None]
        image = image.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        return image.mul_(1 / (max_value * std)).sub_(mean / std)

    def check(self, batch: torch.Tensor, *, name: str = "the batch") -> None:
        """Raise if a normalised tensor [...,C,H,W] has values that no picture has after this normalisation.

        Raises:
            ImageError: values outside [(0-mean)/std, (1-mean)/std] of a channel, or not finite.
        """
        if batch.ndim < 3 or batch.shape[-3] != self.in_chans:
            raise ImageError(f"{name} has shape {tuple(batch.shape)}; [..., {self.in_chans}, H, W] is needed.")
        for channel, (mean, std) in enumerate(zip(self.mean, self.std, strict=True)):
            low, high = (float(value) for value in batch.select(-3, channel).aminmax())
            least, most = (0 - mean) / std, (1 - mean) / std
            if not (least - 1e-2 <= low and high <= most + 1e-2):  # also true for NaN
                raise ImageError(
                    f"{name}: channel {channel} spans [{low:.3f}, {high:.3f}]; with mean {mean:g} and std {std:g} a "
                    f"picture spans at most [{least:.3f}, {most:.3f}]. It was scaled or normalised otherwise. Fix: "
                    "pass the picture itself (uint8, or floats in [0, 1]) and let the transform do both."
                )
