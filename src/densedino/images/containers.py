"""Owns reading picture files with Pillow: what is refused unread, and what Pillow alone would get silently wrong.

Colours are taken as they are stored: ICC profiles and gamma are not applied, as in the pipelines that the released
weights were trained with. An animation or a multi-page file gives its first picture.
"""

from __future__ import annotations

import math
import os
import re
import stat
import sys
import warnings
from contextlib import contextmanager, suppress
from typing import IO, TYPE_CHECKING, Any, cast

import numpy as np
from PIL import Image, ImageFile, TiffImagePlugin, UnidentifiedImageError

from densedino.errors import ImageError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from io import BufferedReader

    from numpy.typing import NDArray

__all__ = ["IMAGE_SUFFIXES", "decode_file", "decode_image", "open_regular"]

FORMATS = ("JPEG", "PNG", "GIF", "BMP", "PPM", "TIFF", "WEBP", "AVIF", "JPEG2000", "ICO")
"""Formats with a signature and a decoder in C: no EPS (it runs Ghostscript), none that Python decodes slowly."""

TGA_SUFFIXES = frozenset({".tga", ".icb", ".vda", ".vst"})
"""TGA has no signature, so that much rubbish would pass for it: it is tried for these names only."""

IMAGE_SUFFIXES = TGA_SUFFIXES | frozenset(
    "." + name
    for name in (
        *("jpg", "jpeg", "jpe", "jfif", "mpo", "png", "apng", "gif", "bmp", "dib", "ppm", "pgm", "pbm", "pnm", "pfm"),
        *("tif", "tiff", "webp", "avif", "avifs", "jp2", "j2k", "j2c", "jpc", "jpf", "jpx", "ico", "heic", "heif"),
    )
)
"""What counts as a picture when a folder is listed. HEIC cannot be read: it is listed to be reported."""

BYTES_PER_PIXEL = 8  # 16-bit RGBA, uncompressed: no honest file needs more
MAX_SCANS = 100  # a progressive JPEG has about 10; each costs a pass over the whole picture

Planes = tuple["NDArray[Any]", "NDArray[np.bool_] | None"]


def open_regular(path: str | os.PathLike[str]) -> BufferedReader:
    """Open a file for reading, without ever waiting for a pipe or a device.

    Raises:
        ImageError: `path` cannot be opened, or is no regular file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise ImageError(f"{os.fspath(path)!r} cannot be opened: {reason}.") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ImageError(f"{os.fspath(path)!r} is no regular file, but a folder, pipe, socket or device.")
    return os.fdopen(descriptor, "rb")


def decode_file(
    file: IO[bytes], *, name: str, suffix: str = "", max_pixels: int, enough_pixels: int | None = None
) -> Planes:
    """Decode the first picture in `file`.

    With `enough_pixels`, a JPEG may be decoded at a half, a quarter or an eighth of its size, to no fewer than these.

    Returns:
        Upright pixels [H,W,1 or 3] (uint8, uint16, int32 or float32), and a mask [H,W] of the pixels that are not
        wholly transparent, or None where the file has no transparency.

    Raises:
        ImageError: no picture, not the whole picture, or more than `max_pixels` of it.
    """
    size = file.seek(0, os.SEEK_END)
    if size == 0:
        raise ImageError(f"{name} is empty (0 bytes). Fetch it again.")
    if size > BYTES_PER_PIXEL * max_pixels + 2**20:
        raise ImageError(f"{name} has {size:,} bytes, more than a picture of max_pixels={max_pixels:,} can have.")
    file.seek(0)
    with _boundary(name), _quiet_pillow():
        try:
            image = Image.open(file, formats=(*FORMATS, "TGA") if suffix.lower() in TGA_SUFFIXES else FORMATS)
        except UnidentifiedImageError as error:
            raise ImageError(f"{name} {_explain_unidentified(file)}") from error
        _check_size(image, name, max_pixels)
        if image.format in ("JPEG", "MPO"):
            _check_jpeg(image, file, size, name)
            if enough_pixels is not None:
                share = (enough_pixels / (image.width * image.height)) ** 0.5
                image.draft(None, (math.ceil(image.width * share), math.ceil(image.height * share)))
        if isinstance(image, TiffImagePlugin.TiffImageFile):
            _check_tiff(image, name)
        return _upright(image, *(_sixteen_bit_colours(image, file) or _planes(image)))


def decode_image(image: Image.Image, *, name: str, max_pixels: int) -> Planes:
    """Do the same for a Pillow image, loaded or not. 16-bit colours have 8 bits there: Pillow cannot hold more."""
    with _boundary(name), _quiet_pillow():
        _check_size(image, name, max_pixels)
        return _upright(image, *_planes(image))


@contextmanager
def _boundary(name: str) -> Iterator[None]:
    """Turn whatever a decoder raises for a damaged file into one ImageError."""
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise ImageError(
            f"{name} was not read: PIL.ImageFile.LOAD_TRUNCATED_IMAGES is on in this process, so that damaged files "
            "would give grey pixels without a word. Fix: PIL.ImageFile.LOAD_TRUNCATED_IMAGES = False"
        )
    try:
        yield
    except ImageError:
        raise
    except MemoryError as error:
        raise ImageError(
            f"{name} does not fit into memory. Cut the picture into tiles, or lower max_pixels."
        ) from error
    except Image.DecompressionBombError as error:
        fix = "Fix, if it is genuine: cut it into tiles, or raise PIL.Image.MAX_IMAGE_PIXELS."
        raise ImageError(f"{name}: {error} {fix}") from error
    except Exception as error:  # whatever Pillow's plugins let through: struct.error, KeyError, SyntaxError, zlib.error
        what = f"{type(error).__name__}: {error}"
        raise ImageError(f"{name} is damaged or incomplete ({what}). Fetch it again.") from error


_IGNORE_PILLOW = ("ignore", None, Warning, re.compile(r"PIL\."), 0)


@contextmanager
def _quiet_pillow() -> Iterator[None]:
    """Silence Pillow's warnings, also where the caller makes warnings errors.

    One entry is put into the filters and taken out again: `warnings.catch_warnings` is not safe between threads.
    """
    filters = cast("list[Any]", warnings.filters)
    filters.insert(0, _IGNORE_PILLOW)
    try:
        yield
    finally:
        with suppress(ValueError):  # somebody reset the filters meanwhile
            filters.remove(_IGNORE_PILLOW)


def _check_size(image: Image.Image, name: str, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(
            f"{name} is {width}×{height} = {width * height:,} pixels by its header, more than "
            f"max_pixels={max_pixels:,}. Fix, if it is genuine: cut it into tiles, or raise max_pixels."
        )


def _check_jpeg(image: Image.Image, file: IO[bytes], size: int, name: str) -> None:
    """Refuse the JPEG whose few bytes stand for millions of pixels: libjpeg would make up the missing ones."""
    if image.width * image.height > size * 8 * 64:
        raise ImageError(f"{name} is incomplete: {size:,} bytes are less than a bit for each 8×8 block of pixels.")
    if image.info.get("progressive"):
        position = file.tell()
        file.seek(0)
        scans = file.read().count(b"\xff\xda")  # start of scan: cannot occur inside compressed data
        file.seek(position)
        if scans > MAX_SCANS:
            raise ImageError(
                f"{name} is a JPEG of {scans} scans; up to {MAX_SCANS} are read. Save it again as baseline."
            )


def _check_tiff(image: TiffImagePlugin.TiffImageFile, name: str) -> None:
    """Refuse the layouts that Pillow opens, and gets wrong."""
    tags = image.tag_v2
    deep = max(tags.get(258, (1,))) > 8
    bands, photometric = tags.get(277, 1), tags.get(262, 1)
    problem = ""
    if not deep and 2 in tags.get(339, (1,)):
        problem = "signed bytes"
    elif deep and photometric == 0:
        problem = "white stored as zero, in more than 8 bits"
    elif deep and bands > 1 and tags.get(284, 1) == 2:
        problem = "one plane after another, in more than 8 bits"
    elif deep and tags.prefix == b"MM" and tags.get(259, 1) != 1 and image.mode in ("I", "F"):
        problem = "compressed big-endian 32-bit values"
    elif photometric in (0, 1) and bands > len(image.getbands()):
        problem = f"{bands} bands that are not declared as colours"
    if problem:
        raise ImageError(
            f"{name} is a TIFF with {problem}, which is not read here. Read it with tifffile, and pass the array."
        )


def _rawmode(image: Image.Image) -> str:
    """How the pixels lie in a file that is not loaded yet, in Pillow's notation, such as 'RGB;16B'."""
    tiles = getattr(image, "tile", None)
    arguments = tiles[0].args if tiles else ""
    first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return first if isinstance(first, str) else ""


def _sixteen_bit_colours(image: Image.Image, file: IO[bytes]) -> Planes | None:
    """16-bit colours of a PNG or TIFF, exactly: Pillow has no mode for them and keeps the high bytes only.

    Read twice, the second time as if the byte order were the other one, the high and the low bytes are both had.
    16-bit grey with alpha is read once, as if each of its four bytes were a channel. None for all other files, also
    for TIFF with premultiplied alpha or CMYK, which keep 8 bits.
    """
    rawmode = _rawmode(image)
    key = image.info.get("transparency")
    if rawmode == "LA;16B":
        pairs = _with_rawmode(image, "RGBA").astype(np.uint16)
        deep = pairs[..., 0::2] << 8 | pairs[..., 1::2]
        return deep[..., :1], deep[..., 1] > 0
    found = re.fullmatch(r"(RGB|RGBA|RGBX);16([LBN])", rawmode)
    if found is None:
        return None
    order = {"L": "B", "B": "L", "N": "B" if sys.byteorder == "little" else "L"}[found[2]]
    again = Image.open(file, formats=FORMATS)
    low = _with_rawmode(again, f"{found[1]};16{order}")
    deep = np.array(image).astype(np.uint16) << 8 | low
    valid = deep[..., 3] > 0 if deep.shape[2] == 4 else None
    if isinstance(key, tuple):
        valid = (deep != np.array(key)).any(-1)
    return deep[..., :3], valid


def _with_rawmode(image: Image.Image, rawmode: str) -> NDArray[np.uint8]:
    opened = cast("ImageFile.ImageFile", image)
    opened.tile = [
        tile._replace(
            args=rawmode if isinstance(tile.args, str) else (rawmode, *cast("tuple[Any, ...]", tile.args)[1:])
        )
        for tile in opened.tile
    ]
    return np.array(opened)


def _planes(image: Image.Image) -> Planes:
    """Colours [H,W,1 or 3] and the mask of what is not transparent, for every mode Pillow has."""
    key_unit = {"L;2": 85, "L;4": 17}.get(_rawmode(image), 1)  # PNG: pixels are stretched to 8 bits, the key is not
    image.load()
    key = image.info.get("transparency")
    if image.mode.startswith("I;16") or image.mode in ("I", "F", "L", "RGB"):
        array = np.array(image)
        array = array[..., None] if array.ndim == 2 else array
        if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
            array = array.astype(np.uint16)  # Pillow stretches a PPM of any depth to 16 bits, and calls them "I"
        valid = (array != np.array(key) * key_unit).any(-1) if isinstance(key, int | tuple) else None
        return array, valid
    grey = image.mode in ("1", "LA", "La")
    if image.has_transparency_data:
        array = np.array(image.convert("LA" if grey else "RGBA"))
        return array[..., :-1], array[..., -1] > 0
    array = np.array(image.convert("L" if grey else "RGB"))
    return (array[..., None] if grey else array), None


def _upright(image: Image.Image, array: NDArray[Any], valid: NDArray[np.bool_] | None) -> Planes:
    """Apply the EXIF orientation (1–8). Pillow has done so itself for TIFF, and removed the tag."""
    orientation = 1
    with suppress(Exception):  # damaged EXIF: the picture is good, and taken as it lies
        orientation = image.getexif().get(0x0112, 1)

    def turn(plane: NDArray[Any]) -> NDArray[Any]:
        plane = plane.swapaxes(0, 1) if orientation in (5, 6, 7, 8) else plane
        plane = plane[::-1] if orientation in (3, 4, 7, 8) else plane
        plane = plane[:, ::-1] if orientation in (2, 3, 6, 7) else plane
        return np.ascontiguousarray(plane)

    return turn(array), None if valid is None else turn(valid)


_SIGNATURES = (
    (
        rb"\xff\xd8\xff|\x89PNG|GIF8|II[*+]\x00|MM\x00[*+]|RIFF....WEBP|....ftypavi|....jP  |\xff\x4f\xff\x51",
        "is damaged from its header on, or of a kind Pillow cannot read. Read it otherwise, and pass the array",
    ),
    (rb"%PDF", "is a PDF. Render its pages to PNG first"),
    (rb"(?s)\s*(<\?xml.{0,900})?(<!--.{0,900})?<svg", "is an SVG drawing. Render it to PNG first"),
    (rb"(?i)\s*(<!doctype html|<html|<head|<body)", "is an HTML page, often a download that failed. Fetch it again"),
    (rb"(?i)\s*<(\?xml|error)", "is XML, often an error message of a download. Fetch it again"),
    (rb"version https://git-lfs", "is a Git LFS pointer, not the file. Run: git lfs pull"),
    (rb"....ftyp(heic|heix|hevc|heim|heis|mif1|msf1)", "is HEIC, which Pillow cannot read. Convert it to JPEG or PNG"),
    (rb"(?s)....ftyp|RIFF....AVI |\x1aE\xdf\xa3", "is a video. Give it the name of one (.mp4, .avi, .mkv, .webm)"),
    (rb"PK\x03\x04", "is a ZIP archive (or an Office file). Unpack it first"),
    (rb"\x1f\x8b|BZh|\xfd7zXZ|7z\xbc\xaf|Rar!|\x28\xb5\x2f\xfd", "is compressed or an archive. Unpack it first"),
    (rb"\x93NUMPY", "is a NumPy file. Load it, and pass the array"),
    (rb"\x89HDF|CDF[\x01\x02\x05]", "is HDF5 or NetCDF. Read it, and pass the array"),
    (rb"\x80[\x02-\x05]", "is a Python pickle, which is never opened. Save the picture as PNG"),
    (rb"8BPS", "is a Photoshop file. Export it as PNG"),
    (rb"%!PS|\xc5\xd0\xd3\xc6", "is PostScript. Render it to PNG first"),
    (rb"\x00+\Z", "holds zero bytes only. Fetch it again"),
    (rb"[\t\n\r\x20-\x7e\x80-\xff]+\Z", "is text. Check the path; a list of paths must be named .txt"),
)


def _explain_unidentified(file: IO[bytes]) -> str:
    file.seek(0)
    head = file.read(2048)
    for pattern, explanation in _SIGNATURES:
        if re.match(pattern, head, re.DOTALL):
            return f"{explanation}."
    return f"is no picture in a format that is read ({', '.join(FORMATS)}, TGA). Convert it to PNG."
