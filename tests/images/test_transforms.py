"""Geometry, parity with the pipelines people know, masks, and the last gate before the model."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from skimage import data
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as v2f

from densedino.errors import ImageError, InputError
from densedino.images.decoding import read_image
from densedino.images.transforms import Transform

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PHOTO = data.astronaut()[:230, :239]
NATIVE = Transform(MEAN, STD)


def tensor(photo: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(photo.copy()).permute(2, 0, 1)


def test_native_size_is_normalised_and_padded():
    prepared = NATIVE(PHOTO)
    assert prepared.pixels.shape == (3, 240, 240)
    assert prepared.pixels.dtype == torch.float32
    assert prepared.pixels.is_contiguous()
    assert prepared.source_size == prepared.input_size == (230, 239)
    expected = v2f.normalize(v2f.to_dtype(tensor(PHOTO), torch.float32, scale=True), MEAN, STD)
    torch.testing.assert_close(prepared.pixels[:, :230, :239], expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(prepared.pixels[:, 230:, :239], expected[:, -1:].expand(3, 10, 239), rtol=0, atol=1e-6)
    torch.testing.assert_close(prepared.pixels[:, :230, 239:], expected[..., -1:], rtol=0, atol=1e-6)
    valid = torch.ones(15, 15, dtype=torch.bool)
    valid[14], valid[:, 14] = False, False
    assert torch.equal(prepared.valid, valid)


def test_multiples_of_the_stride_are_not_touched():
    for fit in ("pad", "crop", "resize", "error"):
        prepared = replace(NATIVE, fit=fit)(PHOTO[:224, :208])
        assert prepared.pixels.shape == (3, 224, 208)
        assert bool(prepared.valid.all())
        torch.testing.assert_close(prepared.pixels, NATIVE(PHOTO).pixels[:, :224, :208])


def test_crop_drops_bottom_and_right():
    prepared = replace(NATIVE, fit="crop")(PHOTO)
    assert prepared.input_size == (224, 224)
    torch.testing.assert_close(prepared.pixels, NATIVE(PHOTO[:224, :224]).pixels)


def test_fit_resize_goes_to_the_nearest_multiple():
    prepared = replace(NATIVE, fit="resize")(PHOTO)
    assert prepared.input_size == (224, 240)
    assert bool(prepared.valid.all())


def test_fit_error_names_the_nearest_sizes():
    with pytest.raises(ImageError, match=r"230×239 pixels .*Nearest: 224×224, 224×240, 240×224, 240×240"):
        replace(NATIVE, fit="error")(PHOTO)


def test_reference_preset_is_the_readme_pipeline():
    readme = v2.Compose(
        [
            v2.ToImage(),
            v2.Resize((256, 256), antialias=True),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    for photo in (PHOTO, data.astronaut(), data.coffee(), PHOTO[:90, :77]):
        prepared = NATIVE.preset("reference")(photo)
        assert prepared.input_size == (256, 256)
        torch.testing.assert_close(prepared.pixels, readme(Image.fromarray(photo)), rtol=0, atol=1e-6)
        pillow = np.asarray(Image.fromarray(photo).resize((256, 256), Image.Resampling.BILINEAR))
        one_level = 1 / 255 / min(STD)
        torch.testing.assert_close(prepared.pixels, NATIVE(pillow).pixels, rtol=0, atol=one_level + 1e-5)


def test_huggingface_preset_is_their_processor():
    import transformers

    processor = transformers.DINOv3ViTImageProcessor(
        size={"height": 224, "width": 224}, image_mean=list(MEAN), image_std=list(STD)
    )
    for photo in (PHOTO, data.coffee()):
        theirs = processor(images=Image.fromarray(photo), return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(NATIVE.preset("huggingface")(photo).pixels, theirs, rtol=0, atol=1e-5)


def test_short_side_is_torchvisions():
    for photo in (PHOTO, data.coffee(), PHOTO[:100, :61]):
        for size in (224, 97):
            prepared = replace(NATIVE, resize=size, interpolation="bicubic")(photo)
            expected = v2f.resize(tensor(photo), [size], interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
            assert prepared.input_size == tuple(expected.shape[1:])
            height, width = prepared.input_size
            torch.testing.assert_close(
                prepared.pixels[:, :height, :width],
                v2f.normalize(v2f.to_dtype(expected, torch.float32, scale=True), MEAN, STD),
                rtol=0,
                atol=1e-6,
            )


def test_all_kinds_of_values_agree_after_resizing():
    transform = NATIVE.preset("reference")
    expected = transform(PHOTO).pixels
    for source in (PHOTO / 255, PHOTO.astype(np.uint16) * 257, tensor(PHOTO), Image.fromarray(PHOTO)):
        torch.testing.assert_close(transform(source).pixels, expected, rtol=0, atol=1 / 255 / min(STD))


def test_16_bit_with_max_value():
    counts = PHOTO.astype(np.uint16) * 16
    with pytest.raises(ImageError, match="max_value=4095"):
        NATIVE(counts)
    torch.testing.assert_close(replace(NATIVE, max_value=4080)(counts).pixels, NATIVE(PHOTO).pixels, rtol=0, atol=1e-5)


def test_transparent_pixels_are_the_mean_and_their_patches_invalid():
    alpha = np.full(PHOTO.shape[:2], 255, np.uint8)
    alpha[:32, :17] = 0
    prepared = NATIVE(Image.fromarray(np.dstack([PHOTO, alpha])))
    assert prepared.pixels[:, :32, :17].abs().max() == 0
    torch.testing.assert_close(prepared.pixels[:, 32:], NATIVE(PHOTO).pixels[:, 32:])
    assert not prepared.valid[:2, :2].any()  # the second column of patches has one transparent column of pixels
    assert bool(prepared.valid[2:14, :14].all())
    assert bool(prepared.valid[:2, 2:14].all())
    assert not prepared.valid[14].any()


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_the_colour_under_transparency_never_shows(interpolation):
    alpha = np.full(PHOTO.shape[:2], 255, np.uint8)
    alpha[50:120, 60:130] = 0
    transform = replace(NATIVE, resize=(128, 128), interpolation=interpolation)
    results = []
    for hidden in (0, 255):
        photo = PHOTO.copy()
        photo[alpha == 0] = hidden
        results.append(transform(Image.fromarray(np.dstack([photo, alpha]))))
    assert torch.equal(results[0].pixels, results[1].pixels)
    untouched = transform(PHOTO).pixels
    patches = results[0].valid.repeat_interleave(16, 0).repeat_interleave(16, 1)
    assert 0 < results[0].valid.sum() < 64
    torch.testing.assert_close(results[0].pixels[:, patches], untouched[:, patches], rtol=0, atol=0.02)


def test_wholly_transparent_picture():
    prepared = NATIVE(Image.fromarray(np.dstack([PHOTO, np.zeros_like(PHOTO[..., 0])])))
    assert not prepared.valid.any()
    assert prepared.pixels.abs().max() == 0


@pytest.mark.parametrize("size", [(1, 1), (1, 20000), (20000, 1), (15, 300)])
def test_less_than_a_patch_is_refused(size):
    photo = np.zeros((*size, 3), np.uint8)
    for fit in ("pad", "crop", "resize", "error"):
        with pytest.raises(ImageError, match=f"{size[0]}×{size[1]} pixels .*smaller than one 16×16 patch"):
            replace(NATIVE, fit=fit)(photo)
    assert NATIVE.preset("reference")(photo).pixels.shape == (3, 256, 256)


def test_thin_pictures_are_not_blown_up_without_bound():
    with pytest.raises(ImageError, match=r"would become 256×5120000, too many.*max_tokens"):
        replace(NATIVE, resize=256)(np.zeros((1, 20000, 3), np.uint8))


def test_max_tokens_scales_down_and_says_so():
    photo = data.astronaut()
    prepared = replace(NATIVE, max_tokens=300)(photo)
    h, w = prepared.valid.shape
    assert h * w <= 300
    assert prepared.source_size == (512, 512)
    assert prepared.input_size == (272, 272)
    assert replace(NATIVE, max_tokens=1024)(photo).input_size == (512, 512)


sides = st.integers(1, 5000)


@given(sides, sides, st.sampled_from(["pad", "crop", "resize"]), st.integers(1, 4096), st.sampled_from([16, 32]))
def test_max_tokens_is_kept_and_used(height, width, fit, max_tokens, stride):
    transform = Transform(MEAN, STD, stride=stride, fit=fit, max_tokens=max_tokens)
    try:
        resized, kept, (h, w) = transform.geometry(height, width)
    except ImageError:
        return
    assert h * w <= max_tokens
    assert all(k <= r for k, r in zip(kept, resized, strict=True))
    if fit != "resize":
        assert resized[0] <= height
        assert resized[1] <= width
        if resized != (height, width):  # a bit larger would be too many
            grown = (resized[0] * 1.001 + 1, resized[1] * 1.001 + 1)
            more = [int(side // stride) if fit == "crop" else -int(-side // stride) for side in grown]
            assert more[0] * more[1] > max_tokens or abs(resized[0] / resized[1] - height / width) > 1e-9


@given(sides, sides, st.sampled_from(["pad", "crop", "resize"]), st.sampled_from([None, 64, (48, 80)]))
def test_geometry_is_what_happens(height, width, fit, resize):
    height, width = height % 150 + 1, width % 150 + 1
    transform = Transform(MEAN, STD, fit=fit, resize=resize)
    photo = np.zeros((height, width, 3), np.uint8)
    try:
        _, kept, grid = transform.geometry(height, width)
    except ImageError:
        with pytest.raises(ImageError):
            transform(photo)
        return
    prepared = transform(photo)
    assert prepared.input_size == kept
    assert tuple(prepared.valid.shape) == grid
    assert prepared.pixels.shape == (3, grid[0] * 16, grid[1] * 16)
    assert int(prepared.valid.sum()) == (kept[0] // 16) * (kept[1] // 16)


def test_check_is_the_last_gate():
    good = NATIVE(PHOTO).pixels
    NATIVE.check(good)
    NATIVE.check(torch.stack([good, good]))
    for bad in (good * 2, good + 3, tensor(PHOTO).float(), torch.full_like(good, float("nan"))):
        with pytest.raises(ImageError, match="scaled or normalised otherwise"):
            NATIVE.check(bad)
    with pytest.raises(ImageError, match=r"\[\.\.\., 3, H, W\]"):
        NATIVE.check(good[:1])


def test_satellite_pixels_do_not_pass_the_gate_of_imagenet_statistics():
    satellite = Transform((0.430, 0.411, 0.296), (0.213, 0.156, 0.143))
    white = np.full((32, 32, 3), 255, np.uint8)
    with pytest.raises(ImageError, match="channel 0"):
        NATIVE.check(satellite(white).pixels)


def test_channels():
    many = Transform((0.5,) * 5, (0.2,) * 5)
    assert many.in_chans == 5
    assert many(np.zeros((32, 32, 5), np.uint8)).pixels.shape == (5, 32, 32)
    with pytest.raises(ImageError, match="3 channels; the model takes 5"):
        many(PHOTO)
    with pytest.raises(ImageError, match="read with 1 channels; the weights take 3"):
        NATIVE(read_image(PHOTO[..., 0], in_chans=1))
    assert NATIVE(PHOTO[..., 0]).pixels.shape == (3, 240, 240)


def test_pixels_can_be_read_before():
    torch.testing.assert_close(NATIVE(read_image(PHOTO)).pixels, NATIVE(PHOTO).pixels)


def test_sources_are_not_changed():
    for source in (PHOTO / np.float32(255), PHOTO.copy(), tensor(PHOTO).float() / 255):
        before = source.copy() if isinstance(source, np.ndarray) else source.clone()
        NATIVE(source)
        assert (source == before).all()


def test_fingerprint_is_of_all_fields():
    variants = [
        NATIVE,
        *(replace(NATIVE, resize=size) for size in (256, (256, 256), (256, 224))),
        *(replace(NATIVE, fit=fit) for fit in ("crop", "resize", "error")),
        replace(NATIVE, mean=(0.430, 0.411, 0.296)),
        replace(NATIVE, std=(0.213, 0.156, 0.143)),
        replace(NATIVE, stride=32),
        replace(NATIVE, interpolation="bicubic"),
        replace(NATIVE, max_tokens=99),
        replace(NATIVE, max_value=4095),
        replace(NATIVE, rounding="none"),
    ]
    assert len({variant.fingerprint() for variant in variants}) == len(variants)
    for variant in variants:
        again = Transform(**json.loads(json.dumps(variant.to_dict())))
        assert again == variant
        assert hash(again) == hash(variant)
        assert again.fingerprint() == variant.fingerprint()


def test_fingerprint_does_not_change_by_accident():
    """Stores written before would be refused: change it on purpose only."""
    assert NATIVE.fingerprint()[:16] == "42c32785df7ba4c2"


@pytest.mark.parametrize(
    "options",
    [
        {"mean": (0.5, 0.5)},
        {"std": (0.0, 0.2, 0.2)},
        {"mean": (123.7, 116.3, 103.5)},
        {"mean": (), "std": ()},
        {"fit": "squash"},
        {"interpolation": "lanczos"},
        {"rounding": "uint16"},
        {"resize": 0},
        {"resize": (256, 0)},
        {"resize": (1, 2, 3)},
        {"stride": 0},
        {"max_tokens": 0},
    ],
)
def test_fields_that_make_no_sense(options):
    with pytest.raises(InputError):
        replace(NATIVE, **options)


def test_unknown_preset():
    with pytest.raises(InputError, match="Valid: native, reference, huggingface"):
        NATIVE.preset("imagenet")


def test_path_is_in_the_message(tmp_path):
    path = tmp_path / "tiny.png"
    file = io.BytesIO()
    Image.fromarray(PHOTO[:3, :3]).save(file, "PNG")
    path.write_bytes(file.getvalue())
    with pytest.raises(ImageError, match=r"tiny\.png.*3×3 pixels"):
        NATIVE(path)
