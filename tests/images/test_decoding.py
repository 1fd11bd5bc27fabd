"""Every source gives the same picture, and values on a doubtful scale are refused with the fix."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from skimage import data

from densedino.errors import ImageError, InputError
from densedino.images.decoding import Pixels, read_image

PHOTO = data.cat()[20:141, 30:197]


def unit(pixels: Pixels) -> np.ndarray:
    return pixels.array / np.float32(pixels.max_value)


def test_all_sources_of_one_picture_agree(tmp_path):
    path = tmp_path / "a photo # 1=ü.png"
    Image.fromarray(PHOTO).save(path)
    tensor = torch.from_numpy(PHOTO).permute(2, 0, 1)
    with path.open("rb") as file:
        sources = {
            "str": str(path),
            "Path": path,
            "bytes": path.read_bytes(),
            "bytearray": bytearray(path.read_bytes()),
            "file": file,
            "BytesIO": io.BytesIO(path.read_bytes()),
            "pillow": Image.fromarray(PHOTO),
            "lazy pillow": Image.open(path),
            "uint8": PHOTO,
            "uint8 read-only, reversed": np.flip(np.flip(PHOTO).copy()),
            "uint16": PHOTO.astype(np.uint16) * 257,
            "big-endian uint16": (PHOTO.astype(np.uint16) * 257).astype(">u2"),
            "float32": PHOTO.astype(np.float32) / 255,
            "float64": PHOTO / 255,
            "tensor": tensor,
            "float tensor": tensor / 255,
            "double tensor": tensor.double() / 255,
            "uint16 tensor": torch.from_numpy(PHOTO.astype(np.uint16) * 257).permute(2, 0, 1),
        }
        for name, source in sources.items():
            pixels = read_image(source)
            assert pixels.array.flags["C_CONTIGUOUS"], name
            assert pixels.array.flags["WRITEABLE"], name
            np.testing.assert_allclose(unit(pixels), PHOTO / np.float32(255), atol=1e-6, err_msg=name)
    half = unit(read_image((tensor / 255).half()))
    assert np.abs(half - PHOTO / 255).max() < 1e-3


def test_grey_arrays_and_tensors():
    grey = PHOTO[..., 0]
    for source in (grey, grey[..., None], torch.from_numpy(grey.copy()), torch.from_numpy(grey.copy())[None]):
        np.testing.assert_array_equal(read_image(source).array, np.dstack([grey] * 3))
        np.testing.assert_array_equal(read_image(source, in_chans=1).array, grey[..., None])


def test_many_channels():
    bands = np.random.default_rng(0).random((20, 30, 12), np.float32)
    np.testing.assert_array_equal(read_image(bands, in_chans=12).array, bands)
    with pytest.raises(ImageError, match=r"12 channels; the model takes 3.*in_chans=12"):
        read_image(bands)


def test_sources_are_not_changed():
    for array in (PHOTO.copy(), (PHOTO / 255).astype(np.float32)):
        before = array.copy()
        read_image(array)
        np.testing.assert_array_equal(array, before)


def test_masked_arrays_give_the_mask():
    mask = np.zeros(PHOTO.shape, bool)
    mask[:5, :7, 1] = True
    floats = np.where(mask, np.nan, PHOTO / 255)
    for source in (np.ma.masked_array(PHOTO, mask), np.ma.masked_invalid(floats)):
        np.testing.assert_array_equal(read_image(source).valid, ~mask.any(-1))


@pytest.mark.parametrize(
    "source, message",
    [
        (PHOTO.transpose(2, 0, 1), r"channels first: pass array.transpose\(1, 2, 0\)"),
        (torch.from_numpy(PHOTO.copy()), r"pass tensor.permute\(2, 0, 1\)"),
        (PHOTO[None], "one by one, or as a list"),
        (torch.zeros(2, 3, 20, 20), "one by one, or as a list"),
        (PHOTO[0, 0], r"is not \[H,W\]"),
        (np.dstack([PHOTO, PHOTO[..., :1]]), "If the last one is alpha"),
        (np.zeros((0, 5, 3), np.uint8), "no pixels"),
        (PHOTO.astype(np.int64), "int64, which has no agreed white"),
        (torch.from_numpy(PHOTO.astype(np.int32)).permute(2, 0, 1), "int32, which has no agreed white"),
        (PHOTO.astype(complex), "complex128"),
        (np.array([["a"]]), "U1"),
        (PHOTO.astype(np.float32), "0–255 floats: pass uint8, or divide by 255"),
        (PHOTO.astype(np.float32) * 20, "raw counts: give max_value="),
        (PHOTO / 255 / 255, "divided by 255 twice"),
        ((PHOTO / 255 - 0.485) / 0.229, "normalised already"),
        (torch.full((3, 20, 20), -0.5), "normalised already"),
        (np.where(PHOTO > 200, np.nan, PHOTO / 255), "NaN"),
        (np.where(PHOTO > 200, np.inf, PHOTO / 255), "NaN or infinity"),
        (PHOTO.astype(np.uint16), r"8-bit data. Fix: max_value=255"),
        (PHOTO.astype(np.uint16) * 4, r"10-bit data. Fix: max_value=1023"),
        (PHOTO.astype(np.uint16) * 16, r"12-bit data. Fix: max_value=4095"),
        (None, "NoneType is no image source"),
        ([PHOTO], "list is no image source"),
        (42, "int is no image source"),
        (io.StringIO("text"), "mode 'rb'"),
    ],
)
def test_refused_with_the_fix(source, message):
    with pytest.raises(ImageError, match=message):
        read_image(source)


def test_rgb_for_a_grey_model():
    with pytest.raises(ImageError, match=r"takes 1.*convert\('L'\)"):
        read_image(PHOTO, in_chans=1)


def test_max_value_is_white():
    counts = PHOTO.astype(np.uint16) * 16
    expected = counts / 4095
    for source in (
        counts,
        counts.astype(np.int32),
        counts.astype(np.float32),
        torch.from_numpy(counts).permute(2, 0, 1),
    ):
        np.testing.assert_allclose(unit(read_image(source, max_value=4095)), expected, atol=1e-6)
    with pytest.raises(ImageError, match="above max_value=2000"):
        read_image(counts, max_value=2000)
    np.testing.assert_array_equal(read_image(PHOTO, max_value=4095).array, PHOTO)  # 8-bit data stay 8-bit data


def test_max_value_switches_the_guesses_off():
    dark = PHOTO.astype(np.uint16) * 4
    assert read_image(dark, max_value=65535).max_value == 65535
    np.testing.assert_allclose(read_image(PHOTO / 255 / 255, max_value=1).array, PHOTO / 255 / 255, atol=1e-6)


def test_black_and_constant_pictures_are_pictures():
    for source in (
        np.zeros((32, 32, 3), np.uint8),
        np.zeros((32, 32), np.uint16),
        np.zeros((32, 32, 3)),
        np.ones((32, 32)),
    ):
        assert unit(read_image(source)).std() == 0
    assert read_image(np.ones((32, 32, 3), np.uint8)).array.max() == 1


def test_overshoot_of_a_resampling_is_clipped():
    array = read_image(np.array([[-0.001, 0.5, 1.001]])).array
    assert array.min() == 0
    assert array.max() == 1


@pytest.mark.parametrize("options", [{"max_value": 0}, {"max_value": -1}, {"max_value": float("nan")}, {"in_chans": 0}])
def test_options_that_make_no_sense(options):
    with pytest.raises(InputError):
        read_image(PHOTO, **options)


def test_messages_name_the_source(tmp_path):
    with pytest.raises(ImageError, match=r"no-such\.jpg.*No such file"):
        read_image(tmp_path / "no-such.jpg")
    with pytest.raises(ImageError, match=r"tensor of shape \(5,\), float32"):
        read_image(torch.zeros(5))


@given(
    hnp.arrays(
        st.sampled_from([np.uint8, np.uint16, np.int16, np.float16, np.float32, np.float64, np.bool_, ">u2", ">f4"]),
        hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5),
    ),
    st.sampled_from([None, 1.0, 255.0, 4095.0]),
)
def test_any_array_is_refused_or_lies_between_black_and_white(array, max_value):
    try:
        pixels = read_image(array, max_value=max_value)
    except ImageError:
        return
    assert pixels.array.dtype in (np.uint8, np.uint16, np.float32)
    assert pixels.array.ndim == 3
    assert pixels.array.shape[2] == 3
    assert 0 <= unit(pixels).min() <= unit(pixels).max() <= 1


@given(st.binary(max_size=400), st.sampled_from(["", ".jpg", ".tga", ".txt"]))
def test_any_bytes_are_refused_or_a_picture(tmp_path_factory, content, suffix):
    path = Path(tmp_path_factory.getbasetemp(), f"any{suffix}")
    path.write_bytes(content)
    for source in (content, path):
        with contextlib.suppress(ImageError):
            assert read_image(source).array.ndim == 3
