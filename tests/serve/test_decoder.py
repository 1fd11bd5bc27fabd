import io

import numpy as np
from PIL import Image

from densedino.serve.decoder import HEAD, pack, respond

ASK = {"in_chans": 3, "max_pixels": 10_000}


def test_pixels_come_as_they_are(png):
    header, body = respond(ASK, png(16, 24))
    array = np.frombuffer(body, header["dtype"]).reshape(header["shape"])
    assert np.array_equal(array, np.asarray(Image.open(io.BytesIO(png(16, 24)))))
    assert header["max_value"] == 255 and not header["masked"]


def test_transparency_comes_behind_the_pixels():
    file = io.BytesIO()
    rgba = np.zeros((8, 8, 4), np.uint8)
    rgba[:4, :, 3] = 255
    Image.fromarray(rgba).save(file, "PNG")
    header, body = respond(ASK, file.getvalue())
    mask = np.frombuffer(bytes(body), bool, offset=8 * 8 * 3).reshape(8, 8)
    assert header["masked"] and mask[:4].all() and not mask[4:].any()


def test_what_cannot_be_used_is_said_not_raised(png):
    for data in (b"", b"nonsense", png()[:100], png(400, 400)):
        header, body = respond(ASK, data)
        assert header["error"] and not body


def test_a_preview_of_16_bits_is_a_jpeg_of_8():
    file = io.BytesIO()
    Image.fromarray(np.linspace(0, 65535, 64 * 32).reshape(32, 64).astype(np.uint16)).save(file, "PNG")
    header, body = respond({**ASK, "preview": 16}, file.getvalue())
    image = Image.open(io.BytesIO(body))
    assert header["type"] == "image/jpeg" and image.size == (16, 8)
    assert np.asarray(image)[0, 0, 0] < 20 and np.asarray(image)[-1, -1, 0] > 235


def test_a_message_is_lengths_header_body():
    data = b"".join(pack({"a": 1}, b"xyz"))
    assert HEAD.unpack(data[:8]) == (8, 3) and data[8:] == b'{"a": 1}xyz'
