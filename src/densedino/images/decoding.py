"""Owns what a picture is here: any source in, an array with a known white level and a mask of real pixels out."""

from __future__ import annotations

import io
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from densedino.errors import ImageError, InputError
from densedino.images.containers import BYTES_PER_PIXEL, decode_file, decode_image, open_regular

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    ImageSource = str | os.PathLike[str] | bytes | IO[bytes] | Image.Image | NDArray[Any] | torch.Tensor

__all__ = ["MAX_PIXELS", "Pixels", "read_image"]

MAX_PIXELS = 178_956_970
"""Default limit: 13,377 × 13,377, the size from which Pillow itself refuses. At most about 12 bytes each in memory."""

HALF_LEVEL = 0.5 / 255  # how far a float may leave [0, 1]: what resampling and half precision add, not a wrong scale


@dataclass(frozen=True, kw_only=True, eq=False)
class Pixels:
    """A decoded picture, upright, in the values of its source."""

    array: NDArray[Any]
    """[H,W,C], uint8, uint16 or float32."""
    valid: NDArray[np.bool_] | None
    """[H,W], False where wholly transparent or masked; None if every pixel is real."""
    max_value: float
    """The value that means white: 255 for uint8, 1 for float32."""
    name: str
    """What it was read from, for messages."""


def read_image(
    source: ImageSource,
    *,
    in_chans: int = 3,
    max_pixels: int = MAX_PIXELS,
    max_value: float | None = None,
    enough_pixels: int | None = None,
) -> Pixels:
    """Read one picture.

    Paths, bytes and binary files hold AVIF, BMP, GIF, ICO, JPEG, JPEG 2000, PNG, PPM, TGA, TIFF or WebP: the content
    decides, not the name. EXIF orientation is applied; palette, CMYK, YCbCr, LAB and 1-bit become RGB or grey; alpha
    becomes `valid` (alpha > 0); the first picture of an animation or of a multi-page file is taken; ICC profiles are
    not applied. 16-bit PNG and TIFF are read exactly (Pillow images, JPEG 2000 and AVIF have 8 bits per colour).
    Arrays are [H,W] or [H,W,C], tensors [H,W] or [C,H,W]: uint8, uint16, or floats in [0, 1]. The mask of a NumPy
    masked array (all channels must be there) becomes `valid`. Grey is repeated where three channels are needed.

    Args:
        source: a path, the bytes of a file, an open binary file, a Pillow image, an array or a tensor.
        in_chans: channels that the model takes.
        max_pixels: refuse a file that declares more, before its pixels are decoded.
        max_value: the value that means white, for data other than 8-bit: 4095 for 12 bits in uint16, say. If not
            given: 65535 for uint16 and 1 for floats, and data that cannot be on that scale is refused. Integers of
            32 bits have no such default.
        enough_pixels: read a JPEG file at a half, a quarter or an eighth of its size where that leaves this many:
            several times as fast, with other numbers than shrinking the whole picture would give.

    Raises:
        ImageError: `source` is not a usable picture; the message says what to do. Nothing else is raised for one.
        InputError: `max_value` or `in_chans` makes no sense.
    """
    if max_value is not None and not (math.isfinite(max_value) and max_value > 0):
        raise InputError(f"max_value is {max_value}; it is the value that means white, such as 4095 for 12-bit data.")
    if in_chans < 1:
        raise InputError(f"in_chans is {in_chans}; a model takes at least 1 channel.")
    name = _describe(source)
    array, valid = _decode(source, name, max_pixels, enough_pixels)
    if 0 in array.shape:
        raise ImageError(f"{name} has no pixels.")
    array, white = _on_known_scale(array, max_value, name)
    valid = None if valid is None or valid.all() else valid
    array = np.require(_with_channels(array, in_chans, name), requirements=("C", "W"))  # what torch can share
    return Pixels(array=array, valid=valid, max_value=white, name=name)


def _describe(source: object) -> str:
    if isinstance(source, str | os.PathLike):
        return repr(os.fspath(source))
    if isinstance(source, bytes):
        return f"the image in {len(source):,} bytes"
    if isinstance(source, Image.Image):
        return f"the Pillow image {getattr(source, 'filename', '') or source.mode!r}"
    if isinstance(source, np.ndarray) or _is_tensor(source):
        kind = "array" if isinstance(source, np.ndarray) else "tensor"
        return f"the {kind} of shape {tuple(source.shape)}, {str(source.dtype).removeprefix('torch.')},"  # type: ignore[attr-defined]
    return f"the image in {getattr(source, 'name', type(source).__name__)}"


def _is_tensor(source: object) -> bool:
    torch = sys.modules.get("torch")  # nobody has a tensor before somebody has imported torch
    return torch is not None and isinstance(source, torch.Tensor)


def _decode(
    source: Any, name: str, max_pixels: int, enough_pixels: int | None
) -> tuple[NDArray[Any], NDArray[np.bool_] | None]:
    def decode(file: IO[bytes], suffix: str = "") -> tuple[NDArray[Any], NDArray[np.bool_] | None]:
        return decode_file(file, name=name, suffix=suffix, max_pixels=max_pixels, enough_pixels=enough_pixels)

    if isinstance(source, str | os.PathLike):
        with open_regular(source) as file:
            return decode(file, Path(source).suffix)
    if isinstance(source, bytes | bytearray | memoryview):
        return decode(io.BytesIO(source))
    if isinstance(source, Image.Image):
        return decode_image(source, name=name, max_pixels=max_pixels)
    if isinstance(source, np.ndarray):
        return _from_array(source, name)
    if _is_tensor(source):
        return _from_tensor(source, name)
    if hasattr(source, "read"):
        data = source.read(BYTES_PER_PIXEL * max_pixels + 2**21)
        if not isinstance(data, bytes):
            raise ImageError(f"{name} was opened as text. Open it with mode 'rb'.")
        suffix = Path(str(getattr(source, "name", ""))).suffix
        return decode(io.BytesIO(data), suffix)
    raise ImageError(
        f"{type(source).__name__} is no image source. Valid: a path, bytes, an open binary file, a Pillow image, a "
        "NumPy array [H,W] or [H,W,C], a torch tensor [H,W] or [C,H,W]."
    )


def _from_array(array: NDArray[Any], name: str) -> tuple[NDArray[Any], NDArray[np.bool_] | None]:
    if array.ndim not in (2, 3):
        hint = " Pass the images of a batch one by one, or as a list." if array.ndim == 4 else ""
        raise ImageError(f"{name} is not [H,W] or [H,W,C].{hint}")
    valid: NDArray[np.bool_] | None = None
    array = array[..., None] if array.ndim == 2 else array
    if isinstance(array, np.ma.MaskedArray):
        valid = np.all(~np.ma.getmaskarray(array), axis=2)
        array = array.filled(0)
    return array.astype(array.dtype.newbyteorder("="), copy=False), valid


def _from_tensor(tensor: torch.Tensor, name: str) -> tuple[NDArray[Any], None]:
    if tensor.ndim not in (2, 3):
        hint = " Pass the images of a batch one by one, or as a list." if tensor.ndim == 4 else ""
        raise ImageError(f"{name} is not [H,W] or [C,H,W].{hint}")
    tensor = tensor.detach().cpu()
    tensor = tensor.float() if tensor.is_floating_point() else tensor
    channels_last = tensor[..., None] if tensor.ndim == 2 else tensor.permute(1, 2, 0)
    return channels_last.numpy(), None


def _with_channels(array: NDArray[Any], in_chans: int, name: str) -> NDArray[Any]:
    channels = array.shape[2]
    if channels == in_chans:
        return array
    if channels == 1 and in_chans == 3:
        return array.repeat(3, axis=2)
    fix = f"Choose or combine channels first, or load a model with in_chans={channels}."
    if array.shape[0] in (in_chans, 1):
        fix = "It looks channels first: pass array.transpose(1, 2, 0)."
    elif "tensor" in name and array.shape[1] == in_chans:
        fix = "It looks channels last, and tensors are [C,H,W]: pass tensor.permute(2, 0, 1)."
    elif channels == in_chans + 1:
        fix = (
            f"If the last one is alpha, pass array[..., :{in_chans}], or a Pillow image, whose alpha is used as a mask."
        )
    elif in_chans == 1:
        fix = "Make it grey first, with PIL: image.convert('L')."
    raise ImageError(f"{name} has {channels} channels; the model takes {in_chans}. {fix}")


def _on_known_scale(array: NDArray[Any], max_value: float | None, name: str) -> tuple[NDArray[Any], float]:
    """Give the array as uint8, uint16 or float32, and its white; refuse what cannot be on that scale."""
    if array.dtype == np.uint8:
        return array, 255.0
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * np.uint8(255), 255.0
    if array.dtype == np.uint16:
        top = int(array.max())
        if max_value is None and 0 < top < 4096:
            likely = next(bits for bits in (8, 10, 12) if top < 2**bits)
            raise ImageError(
                f"{name} holds 16-bit values but none above {top}: it looks like {likely}-bit data. "
                f"Fix: max_value={2**likely - 1}, --max-value on the command line (or 65535, if it is as dark as that)."
            )
        if max_value is not None and top > max_value:
            raise ImageError(f"{name} has values up to {top}, above max_value={max_value:g}, which means white.")
        return array, float(max_value or 65535)
    if array.dtype.kind not in "iuf":
        raise ImageError(f"{name} holds {array.dtype}. Valid: uint8, uint16, or floats in [0, 1].")
    if array.dtype.kind in "iu" and max_value is None:
        raise ImageError(
            f"{name} holds {array.dtype}, which has no agreed white. Valid: uint8, uint16, or floats in [0, 1]. "
            "Fix: convert it to uint8, or give max_value= (255 for 8-bit values, 65535 for 16-bit ones)."
        )
    return _as_unit_floats(array, max_value, name), 1.0


def _as_unit_floats(array: NDArray[Any], max_value: float | None, name: str) -> NDArray[np.float32]:
    low, high = float(array.min()), float(array.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ImageError(
            f"{name} contains NaN or infinity. Fill them, or pass a masked array (numpy.ma.masked_invalid)."
        )
    white = max_value or 1.0
    if low < -HALF_LEVEL * white:
        raise ImageError(
            f"{name} has negative values (down to {low:.4g}): it looks normalised already. The transform normalises "
            "itself: pass uint8, or floats in [0, 1]."
        )
    if high > white + HALF_LEVEL * white:
        fix = f"values above max_value={white:g}, which means white."
        if max_value is None:
            fix = (
                "0–255 floats: pass uint8, or divide by 255."
                if high <= 255.5
                else "raw counts: give max_value=, the value that means white."
            )
        raise ImageError(f"{name} has values up to {high:.6g}. It looks like {fix}")
    if max_value is None and 0 < high <= 1.001 / 255:
        raise ImageError(
            f"{name} has no value above {high:.4g}: it looks divided by 255 twice. Pass uint8, or floats in [0, 1] "
            "(max_value=1, if it is as dark as that)."
        )
    unit: NDArray[np.float32] = array.astype(np.float32) / np.float32(white)
    return unit.clip(0, 1)
