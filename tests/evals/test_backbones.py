"""Names of backbones, and windows over an image."""

from __future__ import annotations

import pytest
import torch

from densedino.errors import InputError
from densedino.evals.backbones import View, WindowEngine, baselines_of, dense_layers, load_backbone, slug_of

pytestmark = pytest.mark.filterwarnings("ignore::densedino.errors.UntrainedWarning")


def test_names() -> None:
    assert load_backbone("debug_vit:random", View()).card.untrained
    assert load_backbone("raw", View(resize=64)).transform.resize == 64
    assert slug_of("vits16:a/b.pth") == "vits16_a_b.pth"
    assert dense_layers("lite0", View()) == (0,) and dense_layers("vitt16", View(layers=(1, 2))) == (1, 2)
    found = baselines_of(["vitt16", "timm:resnet18"], supervised=["unet"])
    assert found[0] == "vitt16:random" and "raw" in found and "unet" in found
    assert "raw" not in baselines_of(["raw"])


def test_windows_of_colours_are_the_image() -> None:
    """What does not look beyond a patch is the same through windows, at every place."""
    whole = load_backbone("raw", View())
    through = load_backbone("raw", View(window=48, window_stride=20))
    pixels = torch.rand(2, 3, 80, 112)
    one, other = whole.engine(pixels)[0], through.engine(pixels)[0]
    torch.testing.assert_close(one.patches[..., :6], other.patches[..., :6], atol=1e-5, rtol=1e-5)
    assert one.cls.shape == other.cls.shape and whole.fingerprint != through.fingerprint


def test_windows_average_what_overlaps() -> None:
    inner = load_backbone("debug_vit:random", View()).engine
    engine = WindowEngine(inner, window=64, stride=32)
    pixels = torch.rand(1, 3, 64, 96)
    found = engine(pixels)[0].patches
    left, right = inner(pixels[..., :64])[0].patches, inner(pixels[..., 32:])[0].patches
    expected = torch.cat([left[:, :, :2], (left[:, :, 2:] + right[:, :, :2]) / 2, right[:, :, 2:]], 2)
    torch.testing.assert_close(found, expected)
    with pytest.raises(InputError, match="must hold a whole patch"):
        WindowEngine(inner, window=8, stride=8)
