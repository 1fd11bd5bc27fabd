"""Builds transformers and timm models that hold the same weights as one of ours.

An independent reading of the key tables: the package's own converters are not used,
so that an error there cannot hide one here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import timm
import torch
from transformers import DINOv3ConvNextConfig, DINOv3ConvNextModel, DINOv3ViTConfig, DINOv3ViTModel

if TYPE_CHECKING:
    from torch import Tensor, nn

TIMM = {
    "vitt16": "vit_tiny_patch16_dinov3_qkvb",
    "vits16": "vit_small_patch16_dinov3_qkvb",
    "vits16plus": "vit_small_plus_patch16_dinov3_qkvb",
    "vitb16": "vit_base_patch16_dinov3_qkvb",
    "vitl16": "vit_large_patch16_dinov3_qkvb",
    "vith16plus": "vit_huge_plus_patch16_dinov3_qkvb",
    "vit7b16": "vit_7b_patch16_dinov3",
    "convnext_tiny": "convnext_tiny.dinov3_lvd1689m",
    "convnext_small": "convnext_small.dinov3_lvd1689m",
    "convnext_base": "convnext_base.dinov3_lvd1689m",
    "convnext_large": "convnext_large.dinov3_lvd1689m",
}
_HF_FFN = {"fc1": "up_proj", "fc2": "down_proj", "w1": "gate_proj", "w2": "up_proj", "w3": "down_proj"}


def _vit_to_huggingface(state: dict[str, Tensor], dim: int) -> dict[str, Tensor]:
    out = {}
    for key, value in state.items():
        if "periods" in key or "bias_mask" in key or key.startswith("local_cls_norm"):
            continue
        head, _, rest = key.partition(".")
        if head == "blocks":
            number, _, rest = rest.partition(".")
            block = f"model.layer.{number}."
            name, _, kind = rest.rpartition(".")
            if name == "attn.qkv":
                for part, letter in zip(value.split(dim), "qkv", strict=True):
                    if kind == "weight" or letter != "k":
                        out[f"{block}attention.{letter}_proj.{kind}"] = part
            elif name == "attn.proj":
                out[f"{block}attention.o_proj.{kind}"] = value
            elif name.startswith("mlp."):
                out[f"{block}mlp.{_HF_FFN[name[4:]]}.{kind}"] = value
            elif name in ("ls1", "ls2"):
                out[f"{block}layer_scale{name[2]}.lambda1"] = value
            else:
                out[f"{block}{rest}"] = value
        elif head == "mask_token":
            out["embeddings.mask_token"] = value[None]
        elif head == "norm":
            out[key] = value
        else:
            new = key.replace("storage_tokens", "register_tokens").replace("patch_embed.proj", "patch_embeddings")
            out[f"embeddings.{new}"] = value
    return out


def huggingface_vit(model: nn.Module) -> nn.Module:
    spec = model.spec
    config = DINOv3ViTConfig(
        hidden_size=spec.embed_dim,
        intermediate_size=spec.hidden_dim,
        num_hidden_layers=spec.depth,
        num_attention_heads=spec.num_heads,
        use_gated_mlp=spec.ffn == "swiglu",
        hidden_act="silu" if spec.ffn == "swiglu" else "gelu",
        query_bias=spec.qkv_bias,
        value_bias=spec.qkv_bias,
        key_bias=False,
        num_register_tokens=spec.num_register_tokens,
        layer_norm_eps=spec.norm_eps,
    )
    oracle = DINOv3ViTModel(config)
    state = _vit_to_huggingface(model.state_dict(), spec.embed_dim)
    if not spec.num_register_tokens:  # theirs keeps an empty one
        state["embeddings.register_tokens"] = torch.empty(1, 0, spec.embed_dim)
    oracle.load_state_dict(state, strict=True)
    return oracle.eval()


def huggingface_convnext(model: nn.Module) -> nn.Module:
    config = DINOv3ConvNextConfig(hidden_sizes=list(model.spec.dims), depths=list(model.spec.depths))
    names = {
        "dwconv": "depthwise_conv",
        "norm": "layer_norm",
        "pwconv1": "pointwise_conv1",
        "pwconv2": "pointwise_conv2",
    }
    state = {}
    for key, value in model.state_dict().items():
        parts = key.split(".")
        if parts[0] == "downsample_layers":
            state[f"model.stages.{parts[1]}.downsample_layers.{'.'.join(parts[2:])}"] = value
        elif parts[0] == "stages":
            parts[3] = names.get(parts[3], parts[3])
            state[f"model.stages.{parts[1]}.layers.{'.'.join(parts[2:])}"] = value
        else:
            state[f"layer_norm.{parts[1]}"] = value
    oracle = DINOv3ConvNextModel(config)
    oracle.load_state_dict(state, strict=True)
    return oracle.eval()


def timm_vit(model: nn.Module, name: str) -> nn.Module:
    spec = model.spec
    oracle = timm.create_model(TIMM[name], depth=spec.depth, dynamic_img_size=True, num_classes=0).eval()
    renames = {"storage_tokens": "reg_token", "ls1.gamma": "gamma_1", "ls2.gamma": "gamma_2"}
    gated = {"mlp.w1": "mlp.fc1_g", "mlp.w2": "mlp.fc1_x", "mlp.w3": "mlp.fc2"}
    state = {}
    for key, value in model.state_dict().items():
        if "periods" in key or "bias_mask" in key or "mask_token" in key or "local_cls_norm" in key:
            continue
        for old, new in {**renames, **gated}.items():
            key = key.replace(old, new)
        if key.endswith("attn.qkv.bias"):
            q, _, v = value.chunk(3)
            state[key.replace("qkv.bias", "q_bias")] = q
            state[key.replace("qkv.bias", "v_bias")] = v
        else:
            state[key] = value
    missing, unexpected = oracle.load_state_dict(state, strict=False)
    assert not unexpected, unexpected
    assert all("k_bias" in k or "periods" in k for k in missing), missing
    with torch.no_grad():
        for block in oracle.blocks:
            if getattr(block.attn, "k_bias", None) is not None:
                block.attn.k_bias.zero_()
    return oracle
