from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from densedino.errors import InputError
from densedino.heads.configs import DetectorConfig
from densedino.heads.detector import Detector, batched
from densedino.heads.proposals import propose
from densedino.heads.windows import windowed_features

if TYPE_CHECKING:
    from collections.abc import Callable

    from heads.conftest import Golden

TINY = DetectorConfig(
    dim=32,
    heads=4,
    encoder_layers=2,
    decoder_layers=2,
    decoder_hidden=64,
    bias_hidden=16,
    queries=12,
    spare_queries=5,
    classes=6,
    windows=2,
    detections=20,
)
BACKBONE = "backbone.0._backbone.backbone."


@torch.no_grad()
def test_every_stage_is_golden(golden: Callable[[str], Golden]) -> None:
    file = golden("de")
    head = Detector(32, TINY).eval()
    head.load_state_dict(file.weights(without=BACKBONE), strict=True)
    tokens_of = file.taps(BACKBONE)
    images = [file["in/image0"], file["in/image1"]]
    pixels, padding = batched(images)
    features = windowed_features(pixels, tokens_of, windows=2)
    assert torch.allclose(features, file["mid/window_features"], atol=1e-5, rtol=0)
    small = file["mid/window_mask"]
    memory = file["mid/encoder_memory"].transpose(1, 2).unflatten(2, (7, 9))
    proposals = propose(head.transformer.enc_output_proj(memory), small)
    assert torch.equal(proposals.boxes, file["mid/proposals"])
    first = head._first_boxes(proposals)
    assert torch.allclose(first, file["mid/ref0"], atol=1e-2, rtol=0)
    found = head.boxes_from(file["mid/window_features"], padding)
    assert torch.allclose(found.logits, file["out/pred_logits"], atol=1e-4, rtol=0)
    assert torch.allclose(found.boxes, file["out/pred_boxes_cxcywh"], atol=1e-2, rtol=0)
    # Differences of pixels, unscaled, amplify rounding: 1e-6 in the backbone become 1.3e-4 here, and the golden file
    # itself is 2e-4 from what float64 gives.
    found = head.boxes(pixels, padding, tokens_of)
    assert torch.allclose(found.logits, file["out/pred_logits"], atol=2e-4, rtol=0)
    assert torch.allclose(found.boxes, file["out/pred_boxes_cxcywh"], atol=2e-2, rtol=0)
    for i, one in enumerate(head(images, tokens_of)):
        assert torch.allclose(one["scores"], file[f"out/img{i}_scores"], atol=1e-4, rtol=0)
        assert torch.equal(one["labels"], file[f"out/img{i}_labels"])
        assert torch.allclose(one["boxes"], file[f"out/img{i}_boxes"], atol=2e-2, rtol=0)


def test_images_are_padded_to_whole_patches_and_marked() -> None:
    pixels, padding = batched([torch.ones(3, 40, 64), torch.ones(3, 33, 20)])
    assert pixels.shape == (2, 3, 48, 64)
    assert torch.equal(pixels[:, 0] == 0, padding)
    assert (~padding[1]).sum() == 33 * 20


def test_an_image_without_enough_proposals_is_refused(golden: Callable[[str], Golden]) -> None:
    file = golden("de")
    with pytest.raises(InputError, match="32×32 pixels give 21 proposals, and 12 are needed, on sides of 64"):
        Detector(32, TINY).eval()([torch.zeros(3, 32, 16 * 2)], file.taps(BACKBONE))
