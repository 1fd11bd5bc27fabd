from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from densedino.heads.configs import Mask2FormerConfig
from densedino.heads.pixel_decoder import PixelDecoder

if TYPE_CHECKING:
    from collections.abc import Callable

    from heads.conftest import Golden


@torch.no_grad()
def test_mask_features_and_memory_are_golden(golden: Callable[[str], Golden]) -> None:
    file = golden("ms")
    decoder = PixelDecoder(32, Mask2FormerConfig(dim=32, heads=4, hidden=64, encoder_layers=2)).eval()
    decoder.load_state_dict(file.weights("segmentation_model.1.pixel_decoder."), strict=True)
    pixels = decoder([file[f"mid/adapter{i}"].clone() for i in (1, 2, 3, 4)])
    assert torch.allclose(pixels.features, file["mid/mask_features"], atol=1e-4, rtol=0)
    for i, memory in enumerate(pixels.memory):
        assert torch.allclose(memory, file[f"mid/multiscale{i}"], atol=1e-4, rtol=0)


@torch.no_grad()
def test_the_pyramid_is_left_as_it_is_but_for_the_list() -> None:
    decoder = PixelDecoder(32, Mask2FormerConfig(dim=32, heads=4, hidden=64, encoder_layers=1)).eval()
    pyramid = [torch.randn(1, 32, 32 // s, 48 // s) for s in (1, 2, 4, 8)]
    before = [level.clone() for level in pyramid]
    first = decoder(tuple(pyramid))
    assert all(torch.equal(a, b) for a, b in zip(pyramid, before, strict=True))
    kept = list(pyramid)
    assert torch.equal(decoder(kept).features, first.features) and not kept
