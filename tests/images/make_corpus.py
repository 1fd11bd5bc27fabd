"""Makes several hundred damaged, odd and hostile image files, always the same, and says what must become of each.

    python make_corpus.py FOLDER     writes FOLDER/images/**, FOLDER/expected/*.npy, FOLDER/manifest.json

The manifest maps each file (relative to FOLDER/images) to one of
    {"must": "refuse"}          an ImageError, no picture
    {"must": "equal", "like": NAME, "within": N}    expected/NAME.npy: mean absolute difference of at most N grey levels
    {"must": "equal or refuse", …}                  for truncated files: the whole picture or none, never half of it
    {"must": "survive"}         a finite picture or an ImageError
and may add {"transparent": true}, part of the picture is to be masked, and {"transform": "refuse"}, it is too small.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import socket
import struct
import sys
import zipfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tifffile
from PIL import Image
from skimage import data

if TYPE_CHECKING:
    from collections.abc import Iterator

PHOTO = np.ascontiguousarray(data.astronaut()[40:136, 160:288])  # 96×128
GREY = np.ascontiguousarray(np.repeat(PHOTO[..., 1:2], 3, 2))
DEEP = PHOTO.astype(np.uint16) * 257 ^ (np.arange(PHOTO.size).reshape(PHOTO.shape) % 251).astype(np.uint16)

Case = tuple[str, bytes, dict[str, Any]]

REFUSE: dict[str, Any] = {"must": "refuse"}
SURVIVE: dict[str, Any] = {"must": "survive"}


def equal(like: str, within: float = 0, **more: Any) -> dict[str, Any]:
    return {"must": "equal", "like": like, "within": within, **more}


def encoded(image: Image.Image | np.ndarray, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, **options)
    return file.getvalue()


def tiff(array: np.ndarray, **options: Any) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, array, **options)
    return file.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, body: bytes, *, depth: int = 8, colours: int = 2, extra: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colours, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def png_of(array: np.ndarray, *, colours: int, extra: bytes = b"") -> bytes:
    depth = array.dtype.itemsize * 8
    rows = b"".join(b"\0" + row.astype(array.dtype.newbyteorder(">")).tobytes() for row in array)
    return png(array.shape[1], array.shape[0], zlib.compress(rows), depth=depth, colours=colours, extra=extra)


def intact() -> dict[str, bytes]:
    """One good file of each kind."""
    image = Image.fromarray(PHOTO)
    return {
        "baseline.jpg": encoded(PHOTO, "JPEG", quality=95),
        "progressive.jpg": encoded(PHOTO, "JPEG", quality=95, progressive=True),
        "full_chroma.jpg": encoded(PHOTO, "JPEG", quality=95, subsampling=0),
        "restarts.jpg": encoded(PHOTO, "JPEG", quality=95, restart_marker_blocks=4),
        "grey.jpg": encoded(GREY[..., 0], "JPEG", quality=95),
        "rgb.png": encoded(PHOTO, "PNG"),
        "deep.png": png_of(DEEP, colours=2),
        "palette.png": encoded(image.quantize(64), "PNG"),
        "palette.gif": encoded(image.quantize(64), "GIF"),
        "rgb.bmp": encoded(PHOTO, "BMP"),
        "raw.tif": encoded(PHOTO, "TIFF"),
        "lzw.tif": encoded(PHOTO, "TIFF", compression="tiff_lzw"),
        "deflate.tif": encoded(PHOTO, "TIFF", compression="tiff_adobe_deflate"),
        "jpeg.tif": encoded(PHOTO, "TIFF", compression="jpeg", quality=95),
        "tiled.tif": tiff(PHOTO, photometric="rgb", tile=(32, 32), compression="zlib"),
        "lossy.webp": encoded(PHOTO, "WEBP", quality=95),
        "lossless.webp": encoded(PHOTO, "WEBP", lossless=True),
        "photo.avif": encoded(PHOTO, "AVIF", quality=95),
        "lossless.jp2": encoded(PHOTO, "JPEG2000"),
        "rgb.ppm": encoded(PHOTO, "PPM"),
        "rgb.tga": encoded(PHOTO, "TGA"),
        "run_length.tga": encoded(PHOTO, "TGA", rle=True),
        "photo.ico": encoded(image.crop((0, 0, 96, 96)), "ICO", sizes=[(96, 96)]),
    }


def good_and_damaged(expected: dict[str, np.ndarray]) -> Iterator[Case]:
    """Each kind whole, cut at many places, with flipped bits, with a hole, and under a wrong name."""
    expected["photo"], expected["grey"] = PHOTO, GREY
    expected["square"] = PHOTO[:96, :96]
    suffixes = [".jpg", ".png", ".tif", ".webp", ".gif", ".bmp", ".JPEG"]
    for number, (name, body) in enumerate(intact().items()):
        rng = np.random.default_rng(number)
        stem, suffix = name.split(".")
        decoded = np.asarray(Image.open(io.BytesIO(body)).convert("RGB"))
        expected[f"whole_{stem}_{suffix}"] = decoded
        if name == "deep.png":
            expected[f"whole_{stem}_{suffix}"] = DEEP
        like = "grey" if stem == "grey" else "square" if suffix == "ico" else "photo"
        lossy = 12 if "palette" in stem else 6 if "jpg" in suffix or stem in ("jpeg", "lossy", "photo") else 0
        yield f"intact/{name}", body, equal("photo", 1) if name == "deep.png" else equal(like, lossy)
        cuts = {3, 9, 20, 40, 100, *np.linspace(120, len(body) - 1, 7).astype(int).tolist(), len(body) - 2}
        for cut in sorted(cuts):
            must = {"must": "equal or refuse", "like": f"whole_{stem}_{suffix}", "within": 0}
            yield f"truncated/{stem}_{cut}.{suffix}", body[:cut], must
        for attempt in range(4):
            damaged = bytearray(body)
            for place in rng.integers(0, len(body), 1 + 4 * attempt):
                damaged[place] ^= 1 << int(rng.integers(8))
            yield f"flipped/{stem}_{attempt}.{suffix}", bytes(damaged), SURVIVE
        for attempt in range(2):
            start = int(rng.integers(0, len(body) // 2 * (attempt + 1)))
            hole = body[:start] + bytes(min(500, len(body) - start)) + body[start + 500 :]
            yield f"holes/{stem}_{attempt}.{suffix}", hole, SURVIVE
        head = bytearray(body)
        head[8:48] = rng.bytes(40)
        yield f"header_noise/{stem}.{suffix}", bytes(head), SURVIVE
        wrong = suffixes[number % len(suffixes)]
        if suffix != "tga":
            yield f"wrong_name/{stem}_{suffix}{wrong}", body, equal(like, max(lossy, 1))
        yield f"trailing/{stem}.{suffix}", body + b"appended " * 50, SURVIVE


def no_pictures() -> Iterator[Case]:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("photo.jpg", encoded(PHOTO, "JPEG"))
    numpy_file = io.BytesIO()
    np.save(numpy_file, PHOTO)
    contents = {
        "page": b"<!DOCTYPE html><html><body>404</body></html>",
        "denied": b'<?xml version="1.0"?>\n<Error><Code>AccessDenied</Code></Error>',
        "drawing": b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
        "document": b"%PDF-1.7\n1 0 obj<<>>endobj\ntrailer<<>>\n%%EOF",
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(/etc/passwd) run\n",
        "archive": archive.getvalue(),
        "gzip": gzip.compress(encoded(PHOTO, "BMP"), mtime=0),
        "pickle": pickle.dumps({"photo": PHOTO}),
        "pickle_that_runs": b"cos\nsystem\n(S'touch /tmp/densedino-was-here'\ntR.",
        "numpy": numpy_file.getvalue(),
        "text": b"This was a photograph once.\n" * 20,
        "json": json.dumps({"detail": "not found"}).encode(),
        "script": b"#!/bin/sh\nrm -rf nothing\n",
        "program": b"\x7fELF\x02\x01\x01" + bytes(300),
        "lfs_pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
        "heic": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64),
        "video": b"\0\0\0\x18ftypisom\0\0\x02\0isomiso2" + bytes(64),
        "psd": b"8BPS\0\1" + bytes(200),
        "noise": np.random.default_rng(1).bytes(3000),
        "zeros": bytes(10_000),
        "ones": b"\xff" * 10_000,
        "one_byte": b"\xff",
        "jpeg_magic": b"\xff\xd8\xff",
        "jpeg_start_end": b"\xff\xd8\xff\xd9",
        "png_magic": b"\x89PNG\r\n\x1a\n",
        "gif_magic": b"GIF89a",
        "tiff_magic": b"II*\0",
        "webp_magic": b"RIFF\x10\0\0\0WEBPVP8 ",
        "bmp_magic": b"BM",
        "ppm_magic": b"P6",
        "newline": b"\n",
    }
    for name, content in contents.items():
        yield f"no_pictures/{name}.jpg", content, REFUSE
    for suffix in ("jpg", "png", "gif", "tif", "webp", "avif", "bmp", "jp2", "tga", "ico"):
        yield f"no_pictures/empty.{suffix}", b"", REFUSE
        yield f"no_pictures/plain_text.{suffix}", b"just text\n" * 30, REFUSE
        yield f"no_pictures/few_zeros.{suffix}", bytes(4096), REFUSE


def bombs() -> Iterator[Case]:
    """Few bytes that ask for much memory or time."""
    zeros = zlib.compress(bytes(100_000_000), 9)
    jpeg = bytearray(intact()["baseline.jpg"])
    size = jpeg.index(b"\xff\xc0") + 5
    jpeg[size : size + 4] = struct.pack(">HH", 65500, 65500)
    yield "bombs/declared_65500.jpg", bytes(jpeg), REFUSE
    jpeg[size : size + 4] = struct.pack(">HH", 8000, 20000)
    yield "bombs/declared_160_megapixels.jpg", bytes(jpeg), REFUSE
    for side in (50_000, 2**31 - 1):
        yield f"bombs/declared_{side}.png", png(side, side, zlib.compress(b"\0")), REFUSE
    yield "bombs/inflates.png", png(30_000, 30_000, zeros, depth=1, colours=0), REFUSE
    yield "bombs/little_of_160_megapixels.png", png(20_000, 8_000, zeros[:3000]), REFUSE
    picture = zlib.compress(b"".join(b"\0" + row.tobytes() for row in PHOTO))
    for kind, body in {
        "zTXt": b"Comment\0\0" + zeros,
        "iTXt": b"Comment\0\1\0\0\0" + zeros,
        "iCCP": b"profile\0\0" + zeros,
        "eXIf": bytes(5_000_000),
    }.items():
        yield f"bombs/{kind}.png", png(128, 96, picture, extra=chunk(kind.encode(), body)), SURVIVE
    many = chunk(b"tEXt", b"k\0" + b"v" * 1000) * 5000
    yield "bombs/many_chunks.png", png(128, 96, picture, extra=many), SURVIVE
    gif = bytearray(intact()["palette.gif"])
    gif[6:10] = struct.pack("<HH", 65535, 65535)
    yield "bombs/canvas.gif", bytes(gif), REFUSE
    frames = [Image.fromarray(np.roll(GREY[:16, :16, 0], n)) for n in range(2000)]
    yield "bombs/frames.gif", encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), SURVIVE
    bmp = bytearray(intact()["rgb.bmp"])
    for name, width, height in (("wide", 2**31 - 1, 2**31 - 1), ("negative", -128, -96), ("min", 128, -(2**31))):
        bmp[18:26] = struct.pack("<ii", width, height)
        yield f"bombs/{name}.bmp", bytes(bmp), SURVIVE if name == "negative" else REFUSE
    webp = b"VP8X" + struct.pack("<I", 10) + b"\x10\0\0\0" + struct.pack("<I", 16383)[:3] + struct.pack("<I", 16383)[:3]
    yield "bombs/canvas.webp", b"RIFF" + struct.pack("<I", 4 + len(webp)) + b"WEBP" + webp, REFUSE
    jp2 = bytearray(intact()["lossless.jp2"])
    siz = jp2.index(b"\xff\x51") + 6
    jp2[siz : siz + 8] = struct.pack(">II", 2**31, 2**31)
    yield "bombs/declared.jp2", bytes(jp2), REFUSE
    avif = bytearray(intact()["photo.avif"])
    ispe = avif.index(b"ispe") + 8
    avif[ispe : ispe + 8] = struct.pack(">II", 2**31 - 1, 2**31 - 1)
    yield "bombs/declared.avif", bytes(avif), REFUSE
    directory = struct.pack("<BBBBHHII", 0, 0, 0, 0, 1, 32, 2**31 - 1, 22)
    yield "bombs/directory.ico", struct.pack("<HHH", 0, 1, 65535) + directory * 3000, REFUSE
    inner = png(50_000, 50_000, zlib.compress(b"\0"))
    entry = struct.pack("<BBBBHHII", 0, 0, 0, 0, 1, 32, len(inner), 22)
    yield "bombs/png_inside.ico", struct.pack("<HHH", 0, 1, 1) + entry + inner, REFUSE
    yield "bombs/declared.ppm", b"P6 100000 100000 255\n" + bytes(99), REFUSE
    yield "bombs/digits.ppm", b"P6 " + b"9" * 100_000 + b" 1 255\n", REFUSE
    yield "bombs/comment.ppm", b"P6 #" + b"x" * 2_000_000, REFUSE
    yield "bombs/spaces.ppm", b"P6" + b" " * 1_000_000, REFUSE
    yield "bombs/plain.ppm", b"P3 13000 13000 255\n" + b"1 " * 100_000, REFUSE
    yield "bombs/nan_scale.pfm", b"Pf\n64 64\nnan\n" + bytes(4 * 4096), REFUSE
    tga = bytearray(intact()["run_length.tga"])
    tga[12:16] = struct.pack("<HH", 65535, 65535)
    yield "bombs/declared.tga", bytes(tga), REFUSE
    progressive = intact()["progressive.jpg"]
    last = progressive.rindex(b"\xff\xda")
    yield "bombs/scans.jpg", progressive[:-2] + progressive[last:-2] * 5000 + b"\xff\xd9", REFUSE
    baseline = intact()["baseline.jpg"]
    for marker in (0xFE, 0xE2, 0xED):
        segment = struct.pack(">BBH", 0xFF, marker, 65535) + b"\0" * 65533
        yield f"bombs/segments_{marker:x}.jpg", baseline[:2] + segment * 100 + baseline[2:], SURVIVE
    yield "bombs/small_segments.jpg", baseline[:2] + b"\xff\xfe\0\2" * 100_000 + baseline[2:], SURVIVE


def tiff_bombs() -> Iterator[Case]:
    def ifd(*tags: tuple[int, int, int, int], following: int = 0) -> bytes:
        entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
        return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(tags)) + entries + struct.pack("<I", following)

    def picture(width: int, height: int, *more: tuple[int, int, int, int]) -> list[tuple[int, int, int, int]]:
        return [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), *more]

    strips = [(273, 4, 1, 8), (277, 3, 1, 1), (278, 4, 1, 2**31 - 1), (279, 4, 1, 2**31 - 1)]
    yield "bombs/declared.tif", ifd(*picture(2**31 - 1, 2**31 - 1, *strips)), REFUSE
    yield "bombs/declared_160_megapixels.tif", ifd(*picture(20_000, 8_000, *strips)), REFUSE
    yield "bombs/endless_ifds.tif", ifd(*picture(64, 64), following=8), REFUSE
    yield "bombs/ifd_in_itself.tif", ifd(*picture(64, 64, (330, 4, 1, 8), (34665, 4, 1, 8), (34853, 4, 1, 8))), REFUSE
    yield "bombs/count.tif", ifd(*picture(64, 64, (273, 4, 2**31 - 1, 8), (279, 4, 2**31 - 1, 8))), REFUSE
    yield "bombs/zero_size.tif", ifd(*picture(0, 0, *strips)), REFUSE
    yield "bombs/no_tags.tif", ifd(), REFUSE
    yield "bombs/self_pointing_header.tif", b"II*\0" + struct.pack("<I", 0), REFUSE
    yield "bombs/far_header.tif", b"II*\0" + struct.pack("<I", 2**32 - 1), REFUSE
    tiles = [(322, 4, 1, 2**31 - 16), (323, 4, 1, 2**31 - 16), (324, 4, 1, 8), (325, 4, 1, 100)]
    yield "bombs/tile.tif", ifd(*picture(64, 64, *tiles)), REFUSE
    deflated = [(256, 4, 1, 12_000), (257, 4, 1, 12_000), (258, 3, 1, 8), (259, 3, 1, 8), (262, 3, 1, 1)]
    zeros = zlib.compress(bytes(300_000_000), 9)
    offset = 8 + 2 + 9 * 12 + 4
    tags = [*deflated, (273, 4, 1, offset), (277, 3, 1, 1), (278, 4, 1, 12_000), (279, 4, 1, len(zeros))]
    yield "bombs/inflates.tif", ifd(*tags) + zeros, SURVIVE


def sizes(expected: dict[str, np.ndarray]) -> Iterator[Case]:
    """Pictures smaller than a patch are refused by the transform; the thinnest that are not must be right."""
    kinds = {"PNG": "png", "JPEG": "jpg", "BMP": "bmp", "GIF": "gif", "TIFF": "tif", "PPM": "ppm"}
    for height, width in ((1, 1), (1, 20_000), (20_000, 1), (15, 15), (2, 300)):
        for kind, suffix in kinds.items():
            grey = (np.add.outer(np.arange(height), np.arange(width)) % 256).astype(np.uint8)
            yield f"sizes/{height}x{width}.{suffix}", encoded(grey, kind), {**SURVIVE, "transform": "refuse"}
    for height, width in ((16, 16), (17, 33), (16, 20_000), (4001, 17)):
        grey = (np.add.outer(np.arange(height), 3 * np.arange(width)) % 256).astype(np.uint8)
        expected[f"size_{height}x{width}"] = np.dstack([grey] * 3)
        for kind in ("PNG", "TIFF", "BMP"):
            yield f"sizes/{height}x{width}.{kinds[kind]}", encoded(grey, kind), equal(f"size_{height}x{width}")
    for name, width, height in (("none", 0, 0), ("flat", 100, 0), ("thin", 0, 100)):
        yield f"sizes/{name}.png", png(width, height, zlib.compress(b"")), REFUSE
    gif = bytearray(intact()["palette.gif"])
    gif[6:10] = bytes(4)
    yield "sizes/none.gif", bytes(gif), SURVIVE


def animations() -> Iterator[Case]:
    first, second = Image.fromarray(PHOTO), Image.fromarray(255 - PHOTO)
    for kind, suffix, options, within in (
        ("PNG", "png", {}, 0),
        ("WEBP", "webp", {"lossless": True}, 0),
        ("AVIF", "avif", {"quality": 95}, 6),
        ("TIFF", "tif", {}, 0),
        ("GIF", "gif", {}, 12),
    ):
        body = encoded(first, kind, save_all=True, append_images=[second] * 3, **options)
        yield f"animated/first_frame.{suffix}", body, equal("photo", within)
    yield (
        "animated/stereo.mpo",
        encoded(first, "MPO", save_all=True, append_images=[second], quality=95),
        equal("photo", 6),
    )


def depths(expected: dict[str, np.ndarray]) -> Iterator[Case]:
    expected["deep"] = DEEP
    expected["deep_grey"] = np.dstack([DEEP[..., 0]] * 3)
    for order in "<>":
        name = "little" if order == "<" else "big"
        for compression in (None, "zlib"):
            options = {"byteorder": order, "compression": compression}
            end = f"{name}_{compression or 'raw'}.tif"
            yield f"depths/rgb16_{end}", tiff(DEEP, photometric="rgb", **options), equal("deep")
            yield f"depths/grey16_{end}", tiff(DEEP[..., 0], photometric="minisblack", **options), equal("deep_grey")
            twelve = tiff(DEEP[..., 0] >> 4, photometric="minisblack", **options)
            yield f"depths/twelve_in_16_{end}", twelve, REFUSE
            inverse = tiff(65535 - DEEP[..., 0], photometric="miniswhite", **options)
            yield f"depths/white_is_zero_{end}", inverse, REFUSE
            planes = tiff(
                np.ascontiguousarray(DEEP.transpose(2, 0, 1)), photometric="rgb", planarconfig="separate", **options
            )
            yield f"depths/planes_{end}", planes, REFUSE
            unit = (PHOTO[..., 1] / 255).astype(np.float32)
            must = REFUSE if (order, compression) == (">", "zlib") else equal("grey", 0.01)
            yield f"depths/float_{end}", tiff(unit, photometric="minisblack", **options), must
            for label, bad in (("0_255", unit * 255), ("normalised", (unit - 0.45) / 0.22), ("nan", unit.copy())):
                if label == "nan":
                    bad[5, 5] = np.nan
                yield f"depths/float_{label}_{end}", tiff(bad, photometric="minisblack", **options), REFUSE
            for dtype in (np.int8, np.int32, np.float64):
                signed = tiff((PHOTO[..., 0] // 2).astype(dtype), photometric="minisblack", **options)
                yield f"depths/{np.dtype(dtype).name}_{end}", signed, REFUSE
    yield "depths/rgb16.png", png_of(DEEP, colours=2), equal("deep")
    yield "depths/grey16.png", png_of(DEEP[..., :1], colours=0), equal("deep_grey")
    yield "depths/twelve_in_16.png", png_of(DEEP[..., :1] >> 4, colours=0), REFUSE
    alpha = np.dstack([DEEP, np.full(DEEP.shape[:2], 65535, np.uint16)])
    alpha[:8, :8, 3] = 0
    yield "depths/rgba16.png", png_of(alpha, colours=6), equal("deep", transparent=True)
    grey_alpha = np.ascontiguousarray(alpha[..., [0, 3]])
    yield "depths/grey_alpha16.png", png_of(grey_alpha, colours=4), equal("deep_grey", transparent=True)
    floats = (PHOTO[::-1, :, 1] / 255).astype("<f4").tobytes()
    yield "depths/unit.pfm", b"Pf\n128 96\n-1.0\n" + floats, equal("grey", 0.01)
    yield "depths/grey16.pgm", b"P5 128 96 65535\n" + DEEP[..., 0].astype(">u2").tobytes(), equal("deep_grey")
    bands = tiff(np.dstack([PHOTO] * 2), photometric="minisblack", planarconfig="contig")
    yield "depths/six_bands.tif", bands, REFUSE


def modes(expected: dict[str, np.ndarray]) -> Iterator[Case]:
    image = Image.fromarray(PHOTO)
    ink = np.dstack([255 - PHOTO, np.zeros_like(PHOTO[..., 0])])
    cmyk = Image.frombytes("CMYK", image.size, ink.tobytes())
    yield "modes/cmyk.jpg", encoded(cmyk, "JPEG", quality=95), equal("photo", 6)
    yield "modes/cmyk.tif", encoded(cmyk, "TIFF"), equal("photo")
    yield "modes/ycbcr.tif", encoded(image.convert("YCbCr"), "TIFF"), equal("photo", 2)
    bits = image.convert("1")
    expected["bits"] = np.repeat(np.asarray(bits)[..., None], 3, 2) * np.uint8(255)
    for suffix, kind, options in (("png", "PNG", {}), ("tif", "TIFF", {"compression": "group4"}), ("pbm", "PPM", {})):
        yield f"modes/bits.{suffix}", encoded(bits, kind, **options), equal("bits")
    palette = image.quantize(16)
    expected["palette"] = np.array(palette.getpalette(), np.uint8).reshape(-1, 3)[np.asarray(palette)]
    for suffix, kind in (("png", "PNG"), ("gif", "GIF")):
        body = encoded(palette, kind, transparency=2)
        yield f"modes/palette_transparent.{suffix}", body, equal("palette", transparent=True)
    alpha = np.full(PHOTO.shape[:2], 255, np.uint8)
    alpha[:20, :30] = 0
    for suffix, kind, options in (
        ("png", "PNG", {}),
        ("tif", "TIFF", {}),
        ("webp", "WEBP", {"lossless": True, "exact": True}),
        ("tga", "TGA", {}),
    ):
        yield (
            f"modes/rgba.{suffix}",
            encoded(np.dstack([PHOTO, alpha]), kind, **options),
            equal("photo", transparent=True),
        )
    yield "modes/grey_alpha.png", encoded(np.dstack([GREY[..., 0], alpha]), "PNG"), equal("grey", transparent=True)
    key = struct.pack(">HHH", *PHOTO[10, 10])
    yield "modes/colour_key.png", png_of(PHOTO, colours=2, extra=chunk(b"tRNS", key)), equal("photo", transparent=True)


STORED_AS = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: np.rot90(np.fliplr(a), 1),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: np.rot90(np.fliplr(a), -1),
    8: lambda a: np.rot90(a, -1),
}


def metadata() -> Iterator[Case]:
    for orientation, store in STORED_AS.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored = np.ascontiguousarray(store(PHOTO))
        for suffix, kind, options, within in (
            ("jpg", "JPEG", {"quality": 95}, 6),
            ("png", "PNG", {}, 0),
            ("webp", "WEBP", {"lossless": True}, 0),
            ("tif", "TIFF", {}, 0),
            ("avif", "AVIF", {"quality": 95}, 6),
        ):
            body = encoded(stored, kind, exif=exif, **options)
            yield f"exif/orientation_{orientation}.{suffix}", body, equal("photo", within)
    baseline = intact()["baseline.jpg"]

    def with_segment(marker: int, body: bytes) -> bytes:
        return baseline[:2] + struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body + baseline[2:]

    entry = b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0%s\0\0\0\0\0\0\0\0"
    for value in (0, 9, 255):
        yield f"exif/value_{value}.jpg", with_segment(0xE1, b"Exif\0\0" + entry % bytes([value])), equal("photo", 6)
    broken = {
        "empty": b"",
        "short": b"II*\0",
        "no_header": b"\xff" * 40,
        "text_orientation": b"II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x04\0\0\0abc\0\0\0\0\0",
        "ifd_in_itself": b"II*\0\x08\0\0\0\x01\0\x69\x87\x04\0\x01\0\0\0\x08\0\0\0\x08\0\0\0",
        "huge_count": b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\xff\xff\xff\xff\0\0\0\0\0\0\0\0",
        "many_entries": b"II*\0\x08\0\0\0\xff\xff" + bytes(3000),
    }
    for name, body in broken.items():
        yield f"exif/{name}.jpg", with_segment(0xE1, b"Exif\0\0" + body), equal("photo", 6)
    for name, marker, body in (
        ("icc_noise", 0xE2, b"ICC_PROFILE\0\x01\x01" + b"\x99" * 300),
        ("icc_part_of_many", 0xE2, b"ICC_PROFILE\0\x07\x02" + b"\x99" * 300),
        ("mpf_noise", 0xE2, b"MPF\0" + b"\x99" * 60),
        ("xmp_noise", 0xE1, b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta" + b"<a>" * 400),
        ("xmp_orientation", 0xE1, b'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="banana"/>'),
        ("iptc_noise", 0xED, b"Photoshop 3.0\x008BIM\x04\x04" + b"\xff" * 50),
        ("jfif_short", 0xE0, b"JFIF"),
    ):
        yield f"metadata/{name}.jpg", with_segment(marker, body), SURVIVE
    png_profile = chunk(b"iCCP", b"p\0\0" + zlib.compress(b"no profile"))
    yield "metadata/icc_noise.png", png_of(PHOTO, colours=2, extra=png_profile), equal("photo")
    yield "metadata/gamma.png", png_of(PHOTO, colours=2, extra=chunk(b"gAMA", struct.pack(">I", 1))), equal("photo")
    yield "metadata/bad_checksum.png", png_of(PHOTO, colours=2, extra=chunk(b"tEXt", b"a\0b")[:-1] + b"\0"), SURVIVE
    yield "metadata/ancillary_unknown.png", png_of(PHOTO, colours=2, extra=chunk(b"zzZz", b"x" * 99)), equal("photo")


def odd_names() -> Iterator[Case]:
    body = encoded(PHOTO, "PNG")
    names = [
        "two words",
        "ümläut",
        "漢字",
        "new\nline",
        "tab\tbed",
        "a#b",
        "key=value",
        "c:colon",
        "back\\slash",
        "'quotes\"",
    ]
    names += [
        "-rf",
        "100%",
        "*star?",
        "[1]",
        "{brace}",
        "$HOME",
        "emoji 🦖",
        "e\u0301 decomposed",
        "x" * 240,
        "..dots..",
    ]
    for name in names:
        yield f"names/{name}.png", body, equal("photo")
    yield f"names/{os.fsdecode(bytes([0xFF, 0xFE]))}.png", body, equal("photo")
    yield "names/" + "deep/" * 60 + "photo.png", body, equal("photo")
    yield "names/SHOUTING.PNG", body, equal("photo")


def file_system(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Things that look like files, and are not, or not easily."""
    (folder / "system").mkdir()
    os.mkfifo(folder / "system/pipe.jpg")
    (folder / "system/nowhere.jpg").symlink_to("missing.jpg")
    (folder / "system/loop.jpg").symlink_to("loop.jpg")
    (folder / "system/device.jpg").symlink_to("/dev/zero")
    for name in ("pipe", "nowhere", "loop", "device"):
        yield f"system/{name}.jpg", REFUSE
    (folder / "system/folder.jpg").mkdir()
    (folder / "system/folder.jpg/inside.png").write_bytes(encoded(PHOTO, "PNG"))
    yield "system/folder.jpg/inside.png", equal("photo")
    (folder / "system/up").symlink_to("..")
    for name, head in (("png", encoded(PHOTO, "PNG")[:-60]), ("jpg", b""), ("webp", b"RIFF\xff\xff\xff\x7fWEBPVP8 ")):
        with (folder / f"system/sparse.{name}").open("wb") as file:
            file.write(head)
            file.truncate(2**36)
        yield f"system/sparse.{name}", REFUSE
    (folder / "system/locked.png").write_bytes(encoded(PHOTO, "PNG"))
    (folder / "system/locked.png").chmod(0)
    yield "system/locked.png", SURVIVE  # root may read it
    with socket.socket(socket.AF_UNIX) as listener:
        before = Path.cwd()
        os.chdir(folder / "system")  # the name of a socket must be short
        listener.bind("socket.jpg")
        os.chdir(before)
    yield "system/socket.jpg", REFUSE


def make(target: Path) -> dict[str, dict[str, Any]]:
    folder = target / "images"
    expected: dict[str, np.ndarray] = {}
    manifest: dict[str, dict[str, Any]] = {}
    (target / "expected").mkdir(parents=True)
    for family in (
        *(good_and_damaged(expected), no_pictures(), bombs(), tiff_bombs(), sizes(expected), animations()),
        *(depths(expected), modes(expected), metadata(), odd_names()),
    ):
        for name, body, must in family:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if name in manifest:
                raise ValueError(f"two files are called {name}")
            path.write_bytes(body)
            manifest[name] = must
    manifest.update(file_system(folder))
    for name, array in expected.items():
        np.save(target / "expected" / f"{name}.npy", array)
    text = json.dumps(manifest, indent=1)  # ASCII: names that are no UTF-8 survive as escapes
    (target / "manifest.json").write_text(text)
    return manifest


if __name__ == "__main__":
    print(len(make(Path(sys.argv[1]))), "files")
