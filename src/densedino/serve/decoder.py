"""Owns the decoding process: images in on stdin, pixels out on stdout, nothing else in reach.

Run as `python -P -m densedino.serve.decoder`. A message is 8 bytes of lengths (header, body; little-endian), a JSON
header, and the body. No torch is loaded here; the transform to the model's input runs in the server, on bare arrays.
"""

from __future__ import annotations

import io
import json
import struct
import sys
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from densedino.errors import DenseDinoError
from densedino.images.decoding import read_image
from densedino.serve.seal import seal

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["HEAD", "main", "pack", "respond"]

HEAD = struct.Struct("<II")
_SEEN = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "AVIF", "JPEG2000")
_BYTES_PER_PIXEL = 24  # the file, what Pillow holds, what NumPy holds, what is sent


def pack(header: dict[str, Any], body: bytes | memoryview = b"") -> Iterable[bytes | memoryview]:
    """A message in pieces, so that large bodies are not copied."""
    text = json.dumps(header).encode()
    return HEAD.pack(len(text), len(body)) + text, body


def respond(header: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes | memoryview]:
    """Do what a message asks: decode the image `body`, to pixels or to a preview.

    The header says `max_pixels` and `in_chans`; with `preview`, a long side in pixels, the answer is a JPEG, else the
    array's bytes, followed by those of the mask if `masked`.
    """
    try:
        pixels = read_image(body, in_chans=header["in_chans"], max_pixels=header["max_pixels"])
        if side := header.get("preview"):
            return {"type": "image/jpeg"}, _preview(pixels.array, pixels.max_value, side)
        array = np.ascontiguousarray(pixels.array)
        answer = {
            "shape": array.shape,
            "dtype": array.dtype.str,
            "max_value": pixels.max_value,
            "masked": pixels.valid is not None,
        }
        if pixels.valid is None:
            return answer, array.reshape(-1).view(np.uint8).data
        return answer, array.tobytes() + pixels.valid.tobytes()
    except DenseDinoError as error:
        return {"error": str(error)}, b""
    except MemoryError:
        return {"error": "the image takes more memory to decode than the server allows. Send a smaller one."}, b""


def _preview(array: np.ndarray[Any, Any], white: float, side: int) -> bytes:
    eight = array if array.dtype == np.uint8 else (array.astype(np.float32) * (255 / white)).round().astype(np.uint8)
    image = Image.fromarray(np.ascontiguousarray(eight[..., 0] if eight.shape[2] != 3 else eight))
    image.thumbnail((side, side))
    out = io.BytesIO()
    image.convert("RGB").save(out, "JPEG", quality=88)
    return out.getvalue()


def _warm_up() -> None:
    """Load now, while files can be opened, whatever decoders and encoders load at their first use."""
    Image.init()
    small = Image.new("RGB", (24, 24))
    for name in _SEEN:
        if name in Image.SAVE and name in Image.OPEN:
            file = io.BytesIO()
            try:
                small.save(file, name)
            except (OSError, KeyError):  # this build of Pillow cannot write it
                continue
            respond({"in_chans": 3, "max_pixels": 1024}, file.getvalue())
    respond({"in_chans": 3, "max_pixels": 1024, "preview": 16}, file.getvalue())
    respond({"in_chans": 3, "max_pixels": 1024}, b"no image")


def _read(stream: IO[bytes], count: int) -> bytes:
    data = stream.read(count)
    if len(data) != count:
        raise EOFError
    return data


def main() -> None:
    """Answer messages until stdin ends."""
    max_pixels = int(sys.argv[1])
    _warm_up()
    sealed = seal(memory=2**30 + _BYTES_PER_PIXEL * max_pixels)
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    sink.writelines(pack({"ready": True, "sealed": sealed}))
    sink.flush()
    while True:
        try:
            head, body = HEAD.unpack(_read(source, HEAD.size))
            header, data = json.loads(_read(source, head)), _read(source, body)
        except EOFError:
            return
        sink.writelines(pack(*respond(header, data)))
        sink.flush()


if __name__ == "__main__":
    main()
