from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

import densedino as dd
from densedino.errors import InputError, WeightsNotFoundError
from densedino.tasks.hub import HubModel, TextHubModel, _given, load_module

if TYPE_CHECKING:
    from pathlib import Path


def _load(name: str, files: Path) -> HubModel | TextHubModel:
    return load_module(name, weights=str(files / f"{name}.pth"), backbone_weights=str(files / "debug_vit.pth"))


@torch.no_grad()
def test_outputs_are_the_references(head_files: Path) -> None:
    x = torch.randn(2, 3, 64, 96)
    assert _load("debug_vit-lc", head_files)(x).shape == (2, 7)
    assert _load("debug_vit-dpt", head_files)(x).shape == (2, 1, 64, 96)
    segmentor = _load("debug_vit-m2f", head_files)
    masks = segmentor(x)
    assert masks["pred_masks"].shape == (2, 6, 16, 24) and len(masks["aux_outputs"]) == 3
    assert segmentor.predict(x, rescale_to=(30, 40))["pred_masks"].shape == (2, 6, 30, 40)
    detections = _load("debug_vit-detr", head_files)([x[0], x[1, :, :, :80]])
    assert [set(one) for one in detections] == [{"scores", "labels", "boxes"}] * 2
    text = _load("debug_vit-txt", head_files)
    tokens = torch.zeros(3, 77, dtype=torch.int64)
    tokens[:, 1] = 49407
    image, words, scale, patches = text(x, tokens)
    assert image.shape == (2, 64) and words.shape == (3, 64) and scale.shape == (1,) and patches.shape == (2, 24, 32)
    assert torch.allclose(text.encode_image(x, normalize=True), image) and text.logit_scale.exp() == scale


def test_gradients_reach_the_backbone(head_files: Path) -> None:
    model = load_module("debug_vit-lc", pretrained=False)
    model(torch.randn(1, 3, 32, 32)).sum().backward()
    assert model.backbone.patch_embed.proj.weight.grad.abs().sum() > 0 and not model.training


@torch.no_grad()
def test_the_same_numbers_as_by_load(head_files: Path) -> None:
    task = dd.load(
        "debug_vit-dpt", weights=head_files / "debug_vit-dpt.pth", backbone_weights=head_files / "debug_vit.pth"
    )
    x = torch.randn(1, 3, 50, 70)
    assert torch.allclose(_load("debug_vit-dpt", head_files)(x), task.headed.run(x), atol=1e-5)


def test_hashes_and_names_of_releases(head_files: Path) -> None:
    with pytest.raises(InputError, match=r"check_hash: .*lc.pth .* is not the released"):
        load_module(
            "debug_vit-lc",
            weights=str(head_files / "debug_vit-lc.pth"),
            backbone_weights=str(head_files / "debug_vit.pth"),
            check_hash=True,
        )
    with pytest.raises(WeightsNotFoundError, match="synthmix_dpt_head-02040be1"):
        load_module("dinov3_vit7b16_dd", weights="SYNTHMIX")
    assert _given("COCO2017") is None and _given("a.pth") == "a.pth" and _given(None) is None
    with pytest.raises(InputError, match="is no segmentor"):
        _load("debug_vit-lc", head_files).predict(torch.zeros(1, 3, 32, 32))
