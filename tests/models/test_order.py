"""Which layer each parameter belongs to."""

from __future__ import annotations

from densedino.models.catalog import create_model
from densedino.models.order import is_token, layers_of


def test_a_vit_counts_its_blocks() -> None:
    layers = layers_of([name for name, _ in create_model("debug_vit_swiglu", device="meta").named_parameters()])
    assert {name for name, layer in layers.items() if layer == 0} == {
        "cls_token", "storage_tokens", "mask_token", "patch_embed.proj.weight", "patch_embed.proj.bias",
    }  # fmt: skip
    assert {layers["blocks.0.attn.qkv.weight"], layers["blocks.0.ls1.gamma"]} == {1}
    assert layers["blocks.1.mlp.w1.weight"] == 2
    assert layers["norm.weight"] == layers["local_cls_norm.bias"] == 3


def test_a_convnext_counts_through_its_stages() -> None:
    names = ["downsample_layers.0.0.weight", "stages.0.0.gamma", "stages.0.1.gamma", "downsample_layers.1.1.weight"]
    names += ["stages.1.0.norm.bias", "stages.1.10.pwconv1.weight", "norm.weight"]
    assert list(layers_of(names).values()) == [0, 1, 2, 3, 3, 4, 5]


def test_tokens_are_told_by_name() -> None:
    assert is_token("cls_token") and is_token("storage_tokens") and not is_token("norm.weight")
