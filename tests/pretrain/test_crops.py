from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from densedino.errors import InputError
from densedino.pretrain.crops import CropConfig, make_crops, random_box, stack_crops
from densedino.pretrain.distortions import Jitter

SMALL = CropConfig(mean=(0.5,) * 3, std=(0.25,) * 3, global_size=64, local_size=32, num_local=3)
PLAIN = replace(SMALL, jitter_probability=0.0, grayscale=0.0, solarize=0.0, fidelity="paper", hflip=0.0)


def picture(height=90, width=120, channels=3):
    """Smooth in both directions, so that a crop tells where it was taken."""
    rows = torch.linspace(0, 255, height)[None, :, None]
    columns = torch.linspace(255, 0, width)[None, None, :]
    shares = torch.linspace(0, 1, channels)[:, None, None]
    return (shares * rows + (1 - shares) * columns).round().to(torch.uint8)


def crops(config=SMALL, image=None, *, index=0, step=0, seed=0, **more):
    return make_crops(picture() if image is None else image, config, seed=seed, step=step, index=index, **more)


def test_shapes_and_stacking():
    config = replace(SMALL, gram_size=96, local_from_global=True)
    one = crops(config)
    assert one.global_crops.shape == (2, 3, 64, 64)
    assert one.local_crops.shape == (3, 3, 32, 32)
    assert one.gram_crops.shape == (2, 3, 96, 96)
    assert one.offsets.shape == (3, 2)
    batch = stack_crops([one, crops(config, index=1)])
    assert batch.global_crops.shape == (2, 2, 3, 64, 64)
    assert torch.equal(batch.local_crops[:, 0], one.local_crops)
    assert batch.offsets.shape == (3, 2, 2)
    assert stack_crops([crops()]).gram_crops is None
    assert crops(replace(SMALL, num_local=0)).local_crops.shape == (0, 3, 32, 32)


def test_crops_depend_on_their_counters_only():
    again = [crops().global_crops for _ in range(2)]
    assert torch.equal(*again)
    for changed in ({"seed": 1}, {"step": 1}, {"index": 1}):
        assert not torch.equal(again[0], crops(**changed).global_crops)


@pytest.mark.parametrize("channels", [1, 2, 4, 13])
def test_any_number_of_channels(channels):
    config = CropConfig(mean=(0.5,) * channels, std=(0.2,) * channels, rgb=None, global_size=64, local_size=32)
    assert crops(config, picture(channels=channels)).global_crops.shape == (2, channels, 64, 64)
    with pytest.raises(InputError, match=f"with {channels} channels; got shape"):
        crops(config, picture(channels=channels + 1))


def test_all_channels_get_one_geometry_and_only_colours_are_distorted():
    six = picture().repeat(2, 1, 1)
    wild = replace(
        SMALL, mean=(0.5,) * 6, std=(0.25,) * 6, jitter=Jitter(brightness=0.9), jitter_probability=1.0, solarize=1.0
    )
    got = crops(wild, six)
    undistorted = crops(replace(wild, rgb=None), six)
    assert torch.equal(got.global_crops[:, 3:], undistorted.global_crops[:, 3:])
    assert not torch.allclose(got.global_crops[:, :3], undistorted.global_crops[:, :3], atol=0.1)


def test_dtypes_agree():
    byte = picture()
    one = crops(SMALL, byte)
    two = crops(SMALL, (byte.int() * 257).to(torch.uint16))
    three = crops(SMALL, byte.float() / 255)
    four = crops(SMALL, (byte.int() * 16).to(torch.uint16), max_value=4080)
    for other in (two, three, four):  # bytes are resized as bytes: half a grey level, more after jitter and solarising
        difference = (one.global_crops - other.global_crops).abs()
        assert difference.median() < 4 / 255
        assert (difference > 0.2).float().mean() < 0.02


def test_float_colours_out_of_range_are_refused():
    with pytest.raises(InputError, match=r"lie in \[0, 1\]; got 255"):
        crops(SMALL, picture().float())
    crops(SMALL, picture().float(), max_value=255.0)
    crops(replace(SMALL, rgb=None), picture().float())


def sharpness(x):
    return (x[..., 1:] - x[..., :-1]).abs().mean((-1, -2, -3))


@pytest.mark.parametrize(("fidelity", "expected"), [("released", (0, 0.9, 0.5)), ("paper", (1, 0.1, 0.5))])
def test_blur_rates(fidelity, expected):
    assert replace(SMALL, fidelity=fidelity).blur_probabilities == expected
    noise = torch.randint(0, 256, (3, 64, 64), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    config = replace(
        PLAIN, global_scale=(1.0, 1.0), local_size=64, local_scale=(1.0, 1.0), num_local=2, fidelity=fidelity
    )
    stacked = stack_crops([crops(config, noise, index=i) for i in range(150)])
    sharp = sharpness((noise.float() / 255 - 0.5)[None] / 0.25)
    rates = [
        (sharpness(x) < 0.97 * sharp).float().mean().item()
        for x in (stacked.global_crops[0], stacked.global_crops[1], stacked.local_crops)
    ]
    # A blur with sigma below about 0.3 px changes nothing visible: 10 % of those drawn from 0.1 to 2.
    assert rates == pytest.approx([0.9 * p for p in expected], abs=0.1)


def test_gram_crops_show_the_global_crops_undistorted():
    config = replace(SMALL, gram_size=128, hflip=0.5)
    calm = replace(config, jitter_probability=0.0, grayscale=0.0, solarize=0.0)
    for index in range(4):
        got, gram = crops(config, index=index), crops(calm, index=index).gram_crops
        assert torch.equal(got.gram_crops, gram)
        pooled = torch.nn.functional.avg_pool2d(got.gram_crops[:1], 2)
        unblurred = crops(replace(calm, fidelity="released"), index=index).global_crops[:1]  # global 1 is never blurred
        assert (pooled - unblurred).abs().max() < 0.1
    distorted = crops(replace(config, gram_distortions=True, jitter_probability=1.0))
    assert (torch.nn.functional.avg_pool2d(distorted.gram_crops, 2) - distorted.global_crops).abs().max() < 0.1


def test_local_crops_are_windows_of_the_global_ones():
    config = replace(PLAIN, local_from_global=True, num_local=8, fidelity="released", gram_size=96)
    seen = set()
    for index in range(30):
        got = crops(config, index=index)
        for local in range(0, 8, 2):  # windows of the first global crop, which is never blurred
            top, left = got.offsets[local].tolist()
            window = got.global_crops[0, :, top : top + 32, left : left + 32]
            # half of the local crops are blurred, which changes little on a smooth picture
            assert (window - got.local_crops[local]).abs().mean() < 0.02
            seen.add((top, left))
    assert seen == {(y, x) for y in (0, 16, 32) for x in (0, 16, 32)}  # the last offset included
    same = crops(replace(config, local_size=64), index=0)
    assert not same.offsets.any()
    with pytest.raises(InputError, match="do not fit"):
        replace(config, local_size=96)


def test_shared_jitter_is_the_same_in_all_crops():
    flat = torch.full((3, 80, 80), 90, dtype=torch.uint8)
    flat[0] = 160
    config = replace(SMALL, share_jitter=True, jitter_probability=1.0, solarize=0.0)
    got = crops(config, flat)
    colours = torch.cat([got.global_crops[:, :, 0, 0], got.local_crops[:, :, 0, 0]])
    assert (colours - colours[0]).abs().max() < 1e-3
    separate = crops(replace(config, share_jitter=False), flat)
    assert (separate.global_crops[0, :, 0, 0] - separate.global_crops[1, :, 0, 0]).abs().max() > 0.02


@given(st.integers(1, 400), st.integers(1, 400), st.sampled_from([(0.05, 0.32), (0.32, 1.0)]), st.integers(0, 99))
def test_boxes_lie_inside_with_the_asked_area(height, width, scale, seed):
    top, left, h, w = random_box(height, width, scale=scale, rng=np.random.default_rng(seed))
    assert 0 <= top <= top + h <= height
    assert 0 <= left <= left + w <= width
    assert h > 0
    assert w > 0
    if min(height, width) >= 100 and 3 / 4 <= width / height <= 4 / 3:
        assert scale[0] * 0.95 <= h * w / (height * width) <= scale[1] * 1.05
        assert 0.72 < w / h < 1.38


def test_flips_come_as_often_as_asked():
    wide = picture()[:1].expand(3, -1, -1)  # bright on the left
    config = replace(PLAIN, global_scale=(1.0, 1.0), hflip=0.5, num_local=0)
    firsts = torch.stack([crops(config, wide, index=i).global_crops[0, 0] for i in range(200)])
    flipped = (firsts[:, 32, 0] < firsts[:, 32, -1]).float().mean()
    assert 0.4 < flipped < 0.6


def test_configuration_is_checked():
    with pytest.raises(InputError, match="mean has 3 channels and std 4"):
        replace(SMALL, std=(1.0,) * 4)
    with pytest.raises(InputError, match="rgb=None"):
        CropConfig(mean=(0.5,), std=(0.2,))


def test_windows_say_where_a_crop_lies() -> None:
    # A picture whose red is its row and whose green is its column: the crop's middle tells where it was cut.
    rows, cols = torch.meshgrid(torch.arange(100.0) + 0.5, torch.arange(160.0) + 0.5, indexing="ij")
    image = torch.stack([rows / 100, cols / 160, rows * 0])
    plain = CropConfig(
        mean=(0.0,) * 3, std=(1.0,) * 3, global_size=32, num_local=0, jitter_probability=0, grayscale=0, solarize=0
    )
    for index in range(8):
        crops = make_crops(image, plain, seed=0, step=0, index=index)
        assert crops.windows is not None
        for crop, (top, left, height, width, mirrored) in zip(crops.global_crops, crops.windows.tolist(), strict=True):
            assert crop[0].mean() == pytest.approx(top + height / 2, abs=0.01)
            assert crop[1].mean() == pytest.approx(left + width / 2, abs=0.01)
            assert (crop[1, 16, 0] > crop[1, 16, -1]) == bool(mirrored)
