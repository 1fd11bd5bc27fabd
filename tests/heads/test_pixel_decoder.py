from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from densedino.heads.configs import Mask2FormerConfig
from densedino.heads.pixel_decoder import PixelDecoder
from densedino.heads.vit_adapter import Pyramid

if TYPE_CHECKING:
    from collections.abc import Callable

    from heads.conftest import Golden


@torch.no_grad()
def test_mask_features_and_memory_are_golden(golden: Callable[[str], Golden]) -> None:
    file = golden("ms")
    decoder = PixelDecoder(32, Mask2FormerConfig(dim=32, heads=4, hidden=64, encoder_layers=2)).eval()
    decoder.load_state_dict(file.weights("segmentation_model.1.pixel_decoder."), strict=True)
    fine, *coarse = (file[f"mid/adapter{i}"] for i in (1, 2, 3, 4))
    pixels = decoder(Pyramid(fine.split(3, dim=2), tuple(coarse)))
    assert torch.allclose(pixels.features, file["mid/mask_features"], atol=1e-4, rtol=0)
    for i, memory in enumerate(pixels.memory):
        assert torch.allclose(memory, file[f"mid/multiscale{i}"], atol=1e-4, rtol=0)


@torch.no_grad()
def test_strips_are_the_map_and_inputs_are_left_as_they_are() -> None:
    decoder = PixelDecoder(32, Mask2FormerConfig(dim=32, heads=4, hidden=64, encoder_layers=1)).eval()
    fine, *coarse = [torch.randn(1, 32, 32 // s, 48 // s) for s in (1, 2, 4, 8)]
    before = [level.clone() for level in (fine, *coarse)]
    whole = decoder(Pyramid([fine], tuple(coarse)))
    strips = decoder(Pyramid(iter(fine.split(5, dim=2)), tuple(coarse)))
    assert torch.allclose(whole.features, strips.features, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip((fine, *coarse), before, strict=True))
