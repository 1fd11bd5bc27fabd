from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import densedino as dd
from densedino.engines.eager import EagerEngine
from densedino.errors import InputError
from densedino.heads.catalog import HEADS, create_head
from densedino.heads.configs import AdapterConfig, Mask2FormerConfig, SegmentorConfig
from densedino.models.catalog import ViTSpec, create_model
from densedino.tasks.masks import SemanticSegmentor, _scaled

GOLDEN = Path(__file__).parents[3] / "shared" / "spec" / "heads" / "golden_ms.npz"


@pytest.mark.skipif(not GOLDEN.exists(), reason=f"{GOLDEN} is not here")
def test_sliding_windows_are_golden() -> None:
    file = {key: torch.from_numpy(value) for key, value in np.load(GOLDEN).items()}
    prefix = "w/segmentation_model.0.backbone."
    backbone = create_model(ViTSpec(name="tiny", embed_dim=32, depth=4, num_heads=2, hidden_dim=64))
    backbone.load_state_dict({k.removeprefix(prefix): v for k, v in file.items() if k.startswith(prefix)})
    config = SegmentorConfig(
        adapter=AdapterConfig(stem=8, heads=4),
        mask2former=Mask2FormerConfig(
            dim=32, heads=4, hidden=64, encoder_layers=2, decoder_layers=4, queries=7, classes=5
        ),
    )
    spec = replace(HEADS["debug_vit-m2f"], config=config, layers=(0, 1, 2, 3))
    head = create_head(spec)
    own = {k[2:]: v for k, v in file.items() if k.startswith("w/") and not k.startswith(prefix)}
    head.load_state_dict(own, strict=True)
    engine = EagerEngine(backbone, device=torch.device("cpu"), precision="fp32")
    headed = replace(dd.load("debug_vit-m2f", weights="random").headed, spec=spec, head=head, engine=engine)
    said = SemanticSegmentor(headed, crop=64, stride=43).of_pixels(file["in/image"][:1])
    said = F.interpolate(said, size=(50, 70), mode="bilinear")
    # the golden one went through bfloat16 in each window
    assert torch.allclose(said, file["out/slide_semseg_50x70"], atol=2e-2, rtol=0)


def test_classes_at_the_pictures_own_pixels() -> None:
    image = np.random.default_rng(0).integers(0, 255, (70, 101, 3), dtype=np.uint8)
    model = replace(dd.load("debug_vit-m2f", weights="random"), crop=64, stride=48)
    for augment in (False, True):
        (found,) = model(image, augment=augment)
        assert (
            found.classes.shape == found.confidence.shape == (70, 101) and found.classes.max() < len(found.names) == 5
        )
    assert model.raw(torch.zeros(1, 3, 64, 96))["pred_masks"].shape == (1, 6, 16, 24)


def test_any_size_is_filled_to_the_stride() -> None:
    model = replace(dd.load("debug_vit-m2f", weights="random", resize=(50, 75)), crop=96, stride=96)
    assert model(np.zeros((40, 60, 3), np.uint8))[0].classes.shape == (40, 60)


def test_scales_below_one_are_rounded_up() -> None:
    assert [_scaled(896, s) for s in (0.9, 0.95, 1.0, 1.05, 1.1)] == [832, 864, 896, 941, 986]
    assert _scaled((64, 64), 0.9) == (64, 64)


def test_windows_that_cannot_be_are_refused() -> None:
    model = dd.load("debug_vit-m2f", weights="random")
    for crop, stride in ((100, 50), (64, 65), (0, 0)):
        with pytest.raises(InputError, match=f"crop {crop}, stride {stride}"):
            replace(model, crop=crop, stride=stride)
