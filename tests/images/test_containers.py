"""Files that Pillow opens: each mode and container against an independent expectation."""

from __future__ import annotations

import io
import os
import struct
import threading
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageCms, ImageFile
from skimage import color, data

from densedino.errors import ImageError
from densedino.images.containers import IMAGE_SUFFIXES
from densedino.images.decoding import read_image

PHOTO = data.astronaut()[100:221, 150:317]  # 121×167: odd, not square
DEEP = (PHOTO.astype(np.uint16) * 257) ^ np.arange(PHOTO.size, dtype=np.uint16).reshape(PHOTO.shape) % 251


def encoded(image: Image.Image | np.ndarray, kind: str, **options) -> bytes:
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, **options)
    return file.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(
    rows: list[bytes], width: int, colour_type: int, depth: int, extra: bytes = b"", height: int | None = None
) -> bytes:
    header = struct.pack(">IIBBBBB", width, height or len(rows), depth, colour_type, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def png16(array: np.ndarray, extra: bytes = b"") -> bytes:
    colour_type = {1: 0, 2: 4, 3: 2, 4: 6}[array.shape[2]]
    return png([row.astype(">u2").tobytes() for row in array], array.shape[1], colour_type, 16, extra)


@pytest.mark.parametrize(
    "kind, options",
    [
        ("PNG", {}),
        ("BMP", {}),
        ("PPM", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("TIFF", {"compression": "packbits"}),
        ("TIFF", {"compression": "tiff_adobe_deflate"}),
        ("WEBP", {"lossless": True}),
        ("JPEG2000", {"irreversible": False}),
    ],
)
def test_lossless_colour_files_are_read_exactly(kind, options):
    pixels = read_image(encoded(PHOTO, kind, **options))
    assert pixels.array.dtype == np.uint8
    assert pixels.max_value == 255
    assert pixels.valid is None
    np.testing.assert_array_equal(pixels.array, PHOTO)


@pytest.mark.parametrize(
    "kind, options", [("JPEG", {"quality": 95}), ("JPEG", {"progressive": True}), ("WEBP", {}), ("AVIF", {})]
)
def test_lossy_files_are_close(kind, options):
    array = read_image(encoded(PHOTO, kind, **options)).array
    assert array.shape == PHOTO.shape
    assert np.abs(array.astype(int) - PHOTO).mean() < 8


def test_tga_is_read_by_its_name_only(tmp_path):
    body = encoded(PHOTO, "TGA")
    (tmp_path / "a.tga").write_bytes(body)
    (tmp_path / "a.jpg").write_bytes(body)
    np.testing.assert_array_equal(read_image(tmp_path / "a.tga").array, PHOTO)
    with (tmp_path / "a.tga").open("rb") as file:
        np.testing.assert_array_equal(read_image(file).array, PHOTO)
    with pytest.raises(ImageError, match="no picture"):
        read_image(tmp_path / "a.jpg")


def test_content_decides_not_the_name(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(encoded(PHOTO, "PNG"))
    np.testing.assert_array_equal(read_image(tmp_path / "photo.jpg").array, PHOTO)


def test_grey_bilevel_and_palette():
    grey = PHOTO[..., 0]
    np.testing.assert_array_equal(read_image(encoded(grey, "PNG")).array, np.repeat(grey[..., None], 3, 2))
    np.testing.assert_array_equal(read_image(encoded(grey, "PNG"), in_chans=1).array, grey[..., None])
    bits = Image.fromarray(grey).convert("1")
    expected = np.asarray(bits).astype(np.uint8) * 255
    np.testing.assert_array_equal(read_image(encoded(bits, "PNG")).array[..., 0], expected)
    np.testing.assert_array_equal(read_image(encoded(bits, "TIFF", compression="group4")).array[..., 0], expected)
    palette = Image.fromarray(PHOTO).quantize(32)
    looked_up = np.array(palette.getpalette()).reshape(-1, 3)[np.asarray(palette)]
    np.testing.assert_array_equal(read_image(encoded(palette, "PNG")).array, looked_up)
    np.testing.assert_array_equal(read_image(encoded(palette, "GIF")).array, looked_up)


def test_cmyk_is_turned_into_rgb_the_right_way_round():
    cmyk = np.dstack([255 - PHOTO, np.zeros_like(PHOTO[..., :1])])
    image = Image.frombytes("CMYK", (PHOTO.shape[1], PHOTO.shape[0]), cmyk.tobytes())
    np.testing.assert_array_equal(read_image(encoded(image, "TIFF")).array, PHOTO)
    jpeg = read_image(encoded(image, "JPEG", quality=95)).array  # stored inverted, by Adobe's convention
    assert np.abs(jpeg.astype(int) - PHOTO).mean() < 4


def test_lab_is_turned_into_rgb():
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    lab = ImageCms.profileToProfile(Image.fromarray(PHOTO), *profiles, outputMode="LAB")
    array = read_image(encoded(lab, "TIFF")).array
    stored = np.asarray(lab)
    scaled = np.dstack([stored[..., :1] / 2.55, stored[..., 1:].view(np.int8)])
    assert np.abs(array / 255 - color.lab2rgb(scaled)).mean() < 0.006
    assert np.abs(array.astype(int) - PHOTO).mean() < 1


def test_ycbcr_and_hsv_pillow_images():
    for mode in ("YCbCr", "HSV"):
        array = read_image(Image.fromarray(PHOTO).convert(mode)).array
        assert np.abs(array.astype(int) - PHOTO).mean() < 3, mode


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_alpha_becomes_the_mask_and_colours_stay(kind):
    alpha = np.full(PHOTO.shape[:2], 255, np.uint8)
    alpha[:40], alpha[40:50] = 0, 1  # 1 of 255 is still visible
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    pixels = read_image(encoded(np.dstack([PHOTO, alpha]), kind, **options))
    np.testing.assert_array_equal(pixels.array, PHOTO)
    np.testing.assert_array_equal(pixels.valid, alpha > 0)


def test_opaque_alpha_is_no_mask_at_all():
    pixels = read_image(encoded(np.dstack([PHOTO, np.full(PHOTO.shape[:2], 255, np.uint8)]), "PNG"))
    assert pixels.valid is None


def test_grey_with_alpha():
    alpha = (np.arange(PHOTO[..., 0].size).reshape(PHOTO.shape[:2]) % 3 * 127).astype(np.uint8)
    pixels = read_image(encoded(np.dstack([PHOTO[..., 0], alpha]), "PNG"), in_chans=1)
    np.testing.assert_array_equal(pixels.array[..., 0], PHOTO[..., 0])
    np.testing.assert_array_equal(pixels.valid, alpha > 0)


def test_transparent_palette_index():
    palette = Image.fromarray(PHOTO).quantize(8)
    for kind in ("PNG", "GIF"):
        pixels = read_image(encoded(palette, kind, transparency=3))
        np.testing.assert_array_equal(pixels.valid, np.asarray(palette) != 3)


@pytest.mark.parametrize(
    "depth, rows, key", [(1, [b"\x50"], 1), (2, [b"\x1b"], 2), (4, [b"\x12\x34"], 3), (8, [b"\1\2\3\4"], 4)]
)
def test_transparent_grey_level_of_shallow_png(depth, rows, key):
    values = {1: [0, 1, 0, 1], 2: [0, 1, 2, 3], 4: [1, 2, 3, 4], 8: [1, 2, 3, 4]}[depth]
    pixels = read_image(png(rows, 4, 0, depth, chunk(b"tRNS", struct.pack(">H", key))))
    assert pixels.valid.tolist() == [[value != key for value in values]]
    assert pixels.array[0, :, 0].tolist() == [value * 255 // (2**depth - 1) for value in values]


def test_transparent_colour_key():
    body = png([PHOTO[0].tobytes()], PHOTO.shape[1], 2, 8, chunk(b"tRNS", struct.pack(">HHH", *PHOTO[0, 5])))
    np.testing.assert_array_equal(read_image(body).valid, (PHOTO[:1] != PHOTO[0, 5]).any(-1))


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_16_bit_png_is_exact(channels):
    array = np.dstack([DEEP, DEEP[::-1, :, :1]])[..., :channels] if channels != 2 else DEEP[..., :2].copy()
    if channels in (2, 4):
        array[:9, :, -1] = 0
    pixels = read_image(png16(array), in_chans=1 if channels < 3 else 3)
    assert pixels.array.dtype == np.uint16
    assert pixels.max_value == 65535
    np.testing.assert_array_equal(pixels.array, array[..., : 1 if channels < 3 else 3])
    if channels in (2, 4):
        np.testing.assert_array_equal(pixels.valid, array[..., -1] > 0)


def test_16_bit_png_with_a_transparent_colour():
    for array in (DEEP, DEEP[..., :1]):
        key = array[7, 11]
        extra = chunk(b"tRNS", struct.pack(f">{len(key)}H", *key))
        valid = read_image(png16(array, extra), in_chans=array.shape[2]).valid
        np.testing.assert_array_equal(valid, (array != key).any(-1))


@pytest.mark.parametrize(
    "order, compression, predictor, tile",
    [c for c in product("<>", [None, "zlib"], [False, True], [None, (32, 32)]) if c[1] or not c[2]],
)
def test_16_bit_tiff_is_exact(order, compression, predictor, tile):
    for array in (DEEP, DEEP[..., 0], np.dstack([DEEP, DEEP[..., 0] // 2])):
        file = io.BytesIO()
        colours = {"photometric": "rgb" if array.ndim == 3 else "minisblack"}
        tifffile.imwrite(
            file, array, byteorder=order, compression=compression, predictor=predictor, tile=tile, **colours
        )
        pixels = read_image(file.getvalue())
        np.testing.assert_array_equal(pixels.array, array[..., :3] if array.ndim == 3 else np.dstack([array] * 3))


def test_tiff_is_exact_or_refused_whatever_the_layout():
    """Pillow opens several TIFF layouts and gets them wrong in silence; none may pass."""
    rng = np.random.default_rng(0)
    read = 0
    for dtype, bands, order, planes, compression, colours in product(
        ("u1", "i1", "u2", "i2", "u4", "i4", "f2", "f4", "f8"),
        (1, 2, 3, 4, 5),
        "<>",
        ("contig", "separate"),
        (None, "zlib"),
        ("minisblack", "miniswhite", "rgb"),
    ):
        if (bands < 3 and colours == "rgb") or (bands == 1 and planes == "separate"):
            continue
        array = (rng.random((20, 30, bands)) * (1 if dtype[0] == "f" else 120)).astype(dtype)
        if dtype == "u2":
            array[0, 0] = 65535
        stored = array[..., 0] if bands == 1 else array if planes == "contig" else array.transpose(2, 0, 1).copy()
        file = io.BytesIO()
        tifffile.imwrite(
            file, stored, photometric=colours, byteorder=order, compression=compression,
            **({} if bands == 1 else {"planarconfig": planes}),
        )  # fmt: skip
        try:
            pixels = read_image(file.getvalue(), max_value={"u": 65535, "i": 255, "f": 1}[dtype[0]])
        except ImageError as error:
            assert "rray" in str(error) or "Pillow" in str(error), error
            continue
        read += 1
        expected = array.astype(float) / {"u1": 255, "u2": 65535, "u4": 65535, "f4": 1}.get(dtype, 255)
        if colours == "miniswhite":
            assert dtype == "u1"
            expected = 1 - expected
        expected = np.repeat(expected, 3, 2) if bands == 1 else expected[..., :3]
        case = f"{dtype} {bands} {order} {planes} {compression} {colours}"
        np.testing.assert_allclose(pixels.array / pixels.max_value, expected, atol=1e-6, err_msg=case)
    assert read > 40


def test_16_bit_ppm_is_exact():
    body = b"P5 167 121 65535\n" + DEEP[..., 0].astype(">u2").tobytes()
    np.testing.assert_array_equal(read_image(body, in_chans=1).array[..., 0], DEEP[..., 0])


def test_float_pfm_and_tiff():
    floats = (PHOTO[..., 0] / 255).astype(np.float32)
    pfm = b"Pf\n167 121\n-1.0\n" + floats[::-1].astype("<f4").tobytes()
    for body in (pfm, encoded(floats, "TIFF")):
        pixels = read_image(body, in_chans=1)
        assert pixels.array.dtype == np.float32
        np.testing.assert_allclose(pixels.array[..., 0], floats)


ORIENTED = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: np.rot90(np.fliplr(a), 1),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: np.rot90(np.fliplr(a), -1),
    8: lambda a: np.rot90(a, -1),
}
"""How a camera stores the upright picture for each orientation: the EXIF standard's row-0/column-0 table."""


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_exif_orientation(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(ORIENTED[orientation](PHOTO))
    body = encoded(stored, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    np.testing.assert_array_equal(read_image(body).array, PHOTO)
    np.testing.assert_array_equal(read_image(Image.open(io.BytesIO(body))).array, PHOTO)


def test_exif_orientation_turns_the_mask_too():
    alpha = np.full(PHOTO.shape[:2], 255, np.uint8)
    alpha[:20, :50] = 0
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = np.ascontiguousarray(ORIENTED[6](np.dstack([PHOTO, alpha])))
    np.testing.assert_array_equal(read_image(encoded(stored, "PNG", exif=exif)).valid, alpha > 0)


@pytest.mark.parametrize("order", "<>")
def test_orientation_of_a_16_bit_tiff(order):
    for orientation, compression in product(range(1, 9), (None, "zlib")):
        file = io.BytesIO()
        stored = np.ascontiguousarray(ORIENTED[orientation](DEEP))
        extra = [(274, "H", 1, orientation, True)]
        tifffile.imwrite(file, stored, photometric="rgb", byteorder=order, compression=compression, extratags=extra)
        np.testing.assert_array_equal(read_image(file.getvalue()).array, DEEP)


def test_damaged_exif_does_not_cost_the_picture():
    exif = Image.Exif()
    exif[0x0112] = 6
    body = encoded(PHOTO, "JPEG", exif=exif)
    expected = np.asarray(Image.open(io.BytesIO(encoded(PHOTO, "JPEG"))))
    start = body.index(b"Exif\0\0")
    broken = body[: start + 6] + b"\xff" * 12 + body[start + 18 :]
    np.testing.assert_array_equal(read_image(broken).array, expected)


def test_first_picture_of_animations_and_pages():
    frames = [Image.fromarray(PHOTO), Image.fromarray(255 - PHOTO)]
    for kind, options in (("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True})):
        body = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        np.testing.assert_array_equal(read_image(body).array, PHOTO, err_msg=kind)


def test_pixel_limit_is_checked_before_decoding():
    body = encoded(PHOTO, "PNG")[:60]  # the header alone
    with pytest.raises(ImageError, match=r"167×121 = 20,207 pixels by its header.*raise max_pixels"):
        read_image(body, max_pixels=20_000)


def test_bomb_headers():
    huge = png([b""], 50_000, 2, 8, height=50_000)
    with pytest.raises(ImageError, match="tiles"):
        read_image(huge)
    with pytest.raises(ImageError, match="bytes, more than a picture"):
        read_image(encoded(PHOTO, "BMP") + bytes(2**21), max_pixels=30_000)


def test_jpeg_with_too_little_data_for_its_size():
    body = bytearray(encoded(PHOTO, "JPEG"))
    size = body.index(b"\xff\xc0") + 5
    body[size : size + 4] = struct.pack(">HH", 8000, 20000)  # complete to the end marker: libjpeg fills it with grey
    with pytest.raises(ImageError, match="less than a bit for each"):
        read_image(bytes(body))


def test_progressive_jpeg_with_too_many_scans():
    body = encoded(PHOTO, "JPEG", progressive=True)
    start = body.rindex(b"\xff\xda")
    with pytest.raises(ImageError, match=r"scans; up to 100"):
        read_image(body[:-2] + body[start:-2] * 200 + b"\xff\xd9")


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "is empty"),
        (bytes(5000), "zero bytes only"),
        (b"%PDF-1.7 ...", "PDF"),
        (b"<!DOCTYPE html><html>", "HTML page"),
        (b"\n<HTML><head>", "HTML page"),
        (b"<?xml version='1.0'?><svg xmlns=''>", "SVG"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code>", "error message"),
        (b"PK\x03\x04....", "ZIP"),
        (b"\x80\x04\x95....", "pickle, which is never opened"),
        (b"\x93NUMPY\x01\x00", "NumPy"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        (b"\0\0\0\x18ftypheic....", "HEIC"),
        (b"\0\0\0\x18ftypisom....", "video"),
        (b"\0\0\0\x18ftypavif....", "damaged"),
        (b"hello, I am no picture\n", "is text"),
        (b"\xff\xd8\xff\xe0\x00\x10JF", "damaged|incomplete"),
        (b"\x89PNG\r\n\x1a\n\0\0", "damaged"),
        (bytes(range(1, 200)), "no picture in a format"),
    ],
)
def test_what_is_no_picture_is_named(tmp_path, content, message):
    path = tmp_path / "photo.jpg"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=message) as caught:
        read_image(path)
    assert str(path) in str(caught.value)
    with pytest.raises(ImageError, match=message):
        read_image(content)


@pytest.mark.parametrize(
    "kind, options",
    [
        *(("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("GIF", {}), ("BMP", {}), ("PPM", {})),
        *(
            ("TIFF", {}),
            ("TIFF", {"compression": "tiff_lzw"}),
            ("WEBP", {}),
            ("AVIF", {}),
            ("JPEG2000", {}),
            ("ICO", {}),
        ),
    ],
)
def test_a_truncated_file_is_refused_or_whole(kind, options):
    body = encoded(PHOTO, kind, **options)
    whole = read_image(body).array
    for length in sorted({*range(1, 60, 7), *np.linspace(60, len(body) - 1, 25).astype(int)}):
        try:
            array = read_image(body[:length]).array
        except ImageError:
            continue
        np.testing.assert_array_equal(array, whole, err_msg=f"{kind} cut at {length} of {len(body)}")


def test_a_process_that_allows_truncated_images_is_told(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(ImageError, match="LOAD_TRUNCATED_IMAGES = False"):
        read_image(encoded(PHOTO, "PNG"))


def test_pillow_warnings_neither_raise_nor_stay_hidden_afterwards():
    bomb_warning = png([bytes(10_000)] * 9_500, 10_000, 0, 8)  # 95 Mpx: Pillow warns from 89 on
    before = list(warnings.filters)
    assert read_image(bomb_warning, in_chans=1).array.shape == (9_500, 10_000, 1)
    assert warnings.filters == before
    with pytest.raises(Image.DecompressionBombWarning):
        Image.open(io.BytesIO(bomb_warning))


def test_threads_do_not_disturb_each_other():
    bodies = [encoded(np.roll(PHOTO, shift, 1), "PNG") for shift in range(8)] * 8
    before = list(warnings.filters)
    with ThreadPoolExecutor(8) as pool:
        arrays = list(pool.map(lambda body: read_image(body).array, bodies))
    for number, array in enumerate(arrays):
        np.testing.assert_array_equal(array, np.roll(PHOTO, number % 8, 1))
    assert warnings.filters == before


def test_what_is_no_regular_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "broken.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    names = [tmp_path / name for name in ("pipe.jpg", "folder.jpg", "broken.jpg", "loop.jpg", "missing.jpg")]
    for path in [*names, "/dev/zero", "a\0b.jpg"]:
        caught: list[Exception] = []

        def attempt(path=path, caught=caught):
            try:
                read_image(path)
            except ImageError as error:
                caught.append(error)

        thread = threading.Thread(target=attempt, daemon=True)
        thread.start()
        thread.join(5)
        assert caught, f"{path} hangs or passes"


def test_sparse_huge_file(tmp_path):
    with (tmp_path / "huge.png").open("wb") as file:
        file.write(encoded(PHOTO, "PNG")[:-100])
        file.truncate(2**40)
    with pytest.raises(ImageError, match="1,099,511,627,776 bytes"):
        read_image(tmp_path / "huge.png")


def test_suffixes_are_those_pillow_knows():
    Image.init()
    known = set(Image.registered_extensions()) | {".jfif", ".heic", ".heif"}
    assert known >= IMAGE_SUFFIXES
