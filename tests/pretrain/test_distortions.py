from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms.v2 import functional as TF

from densedino.pretrain.distortions import Distortion, Jitter, blur, distort, shift_hue


def picture(channels=3, size=40, seed=0):
    return torch.rand(channels, size, size + 3, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**31), st.floats(-0.5, 0.5))
def test_shift_hue_is_torchvisions(seed, turns):
    x = picture(seed=seed, size=8)
    x[:, 0, 0], x[:, 0, 1], x[:, 0, 2] = 0.0, 1.0, 0.5  # greys have no hue
    x[0, 1, 0] = x[1, 1, 0]  # two equal channels
    torch.testing.assert_close(shift_hue(x, turns), TF.adjust_hue(x, turns), rtol=0, atol=1e-5)


@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
def test_blur_is_torchvisions(sigma):
    x = picture(channels=5)
    torch.testing.assert_close(blur(x, sigma=sigma), TF.gaussian_blur(x, [9, 9], [sigma, sigma]), rtol=0, atol=1e-5)


def test_distortions_come_in_the_order_of_the_recipe():
    x = picture()
    jitter = (("hue", 0.05), ("contrast", 1.3), ("brightness", 0.7), ("saturation", 1.1))
    y = TF.adjust_saturation(TF.adjust_brightness(TF.adjust_contrast(TF.adjust_hue(x, 0.05), 1.3), 0.7), 1.1)
    y = TF.gaussian_blur(TF.rgb_to_grayscale(y, 3), [9, 9], [1.0, 1.0])
    y = TF.solarize(y, 128 / 255)
    got = distort(x, Distortion(jitter=jitter, grayscale=True, sigma=1.0, solarize=True), rgb=(0, 1, 2))
    near_threshold = (y - 0.5).abs() < 0.01
    torch.testing.assert_close(got.where(~near_threshold, y), y, rtol=0, atol=1e-4)


def test_colours_touch_red_green_and_blue_only():
    x = picture(channels=6)
    strong = Distortion(jitter=(("brightness", 0.2), ("hue", 0.3)), grayscale=True, solarize=True)
    y = distort(x, strong, rgb=(4, 1, 2))
    assert torch.equal(y[[0, 3, 5]], x[[0, 3, 5]])
    torch.testing.assert_close(y[[4, 1, 2]], distort(x[[4, 1, 2]], strong, rgb=(0, 1, 2)))
    assert torch.equal(distort(x, strong, rgb=None), x)
    torch.testing.assert_close(distort(x, Distortion(sigma=1.0), rgb=(4, 1, 2)), blur(x, sigma=1.0))
    assert torch.equal(x, picture(channels=6))  # the input is left as it was


def test_jitter_draws_within_its_ranges_in_every_order():
    rng = np.random.default_rng(0)
    draws = [Jitter().draw(rng) for _ in range(500)]
    assert len({tuple(name for name, _ in draw) for draw in draws}) == 24
    for name, (low, high) in {"brightness": (0.6, 1.4), "saturation": (0.8, 1.2), "hue": (-0.1, 0.1)}.items():
        amounts = [dict(draw)[name] for draw in draws]
        assert low <= min(amounts) < low + 0.02
        assert high - 0.02 < max(amounts) <= high
