"""Owns the torch.hub entry points: the reference's names, keyword arguments and outputs, on this package's modules.

    torch.hub.load("<clone of densedino>", "dinov3_vits16", source="local", weights="dinov3_vits16_….pth")

Needs nothing but PyTorch (and safetensors for such files). Unlike the reference's, a local file is read where
it lies, whatever its name; a model comes in eval mode; and weights are compared with what the name promises.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))  # a clone works without installation

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

dependencies = ["torch", "numpy"]

_NAMES = {
    "dinov3_vits16": "vits16",
    "dinov3_vits16plus": "vits16plus",
    "dinov3_vitb16": "vitb16",
    "dinov3_vitl16": "vitl16",
    "dinov3_vitl16plus": "vitl16plus",
    "dinov3_vith16plus": "vith16plus",
    "dinov3_vit7b16": "vit7b16",
    "dinov3_convnext_tiny": "convnext_tiny",
    "dinov3_convnext_small": "convnext_small",
    "dinov3_convnext_base": "convnext_base",
    "dinov3_convnext_large": "convnext_large",
}


def _entry(name: str, model: str) -> Callable[..., nn.Module]:
    def build(
        *,
        pretrained: bool = True,
        weights: Any = "LVD1689M",
        check_hash: bool = False,
        in_chans: int = 3,
    ) -> nn.Module:
        from densedino.errors import InputError
        from densedino.models.catalog import create_model
        from densedino.weights.loading import load_weights

        if not pretrained:
            return create_model(model, in_chans=in_chans)
        if in_chans != 3:
            raise InputError(f"in_chans={in_chans} with pretrained weights of 3 channels; pass pretrained=False.")
        release = str(getattr(weights, "value", weights)).upper().replace("-", "")
        if release in ("LVD1689M", "SAT493M"):
            loaded, card = load_weights(f"{model}-{release.lower()}")
        else:
            loaded, card = load_weights(model, weights=weights)
        if check_hash and card.name not in (f"{model}-lvd1689m", f"{model}-sat493m"):
            raise InputError(f"check_hash: {card.source} (SHA-256 {card.sha256[:8]}…) is no released file of {model}.")
        return loaded

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"""DINOv3 `{model}`.

    Args:
        pretrained: load weights; without, freshly initialised.
        weights: "LVD1689M", "SAT493M", or a path, https:// URL or hub id of a checkpoint in any dialect.
        check_hash: refuse a file whose SHA-256 is not that of the release.
        in_chans: input channels, for `pretrained=False`.
    """
    return build


def _head_entry(name: str) -> Callable[..., Any]:
    def build(
        *,
        pretrained: bool = True,
        weights: Any = None,
        backbone_weights: Any = None,
        check_hash: bool = False,
        autocast_dtype: Any = None,
    ) -> nn.Module:
        from densedino.tasks.hub import load_module

        return load_module(
            name,
            pretrained=pretrained,
            weights=weights,
            backbone_weights=backbone_weights,
            check_hash=check_hash,
            autocast_dtype=autocast_dtype,
        )

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"""A released head on its backbone, `{name}`: normalised pixels in, what the reference's gives out.

    Args:
        pretrained: load weights; without, freshly initialised.
        weights: path, https:// URL or mapping of the head, alone or with the backbone; a release's name or None for
            a file in the cache.
        backbone_weights: likewise of the backbone, in any dialect.
        check_hash: refuse a file of the head whose SHA-256 is not that of the release.
        autocast_dtype: of matrix products, on CUDA; float32 if not given.
    """
    return build


def dinov3_vitl16_dinotxt_tet1280d20h24l(
    *,
    pretrained: bool = True,
    weights: Any = None,
    backbone_weights: Any = None,
    bpe_path_or_url: Any = None,
    check_hash: bool = False,
) -> tuple[nn.Module, Any]:
    """dino.txt, and its tokenizer.

    Args:
        pretrained: load weights; without, freshly initialised.
        weights: path, https:// URL or mapping of the vision head and text encoder.
        backbone_weights: likewise of the backbone, in any dialect.
        bpe_path_or_url: path of CLIP's vocabulary; the package's own copy if not given.
        check_hash: refuse a file whose SHA-256 is not that of the release.
    """
    from densedino.heads.tokenizer import Tokenizer
    from densedino.tasks.hub import load_module

    model = load_module(
        "dinov3_vitl16_dinotxt_tet1280d20h24l",
        pretrained=pretrained,
        weights=weights,
        backbone_weights=backbone_weights,
        check_hash=check_hash,
    )
    own = bpe_path_or_url is None or str(bpe_path_or_url).startswith(("http://", "https://"))  # the same file
    return model, Tokenizer(None if own else bpe_path_or_url)


for _name, _model in _NAMES.items():
    globals()[_name] = _entry(_name, _model)
for _name in (
    "dinov3_vit7b16_lc",
    "dinov3_vit7b16_dd",
    "dinov3_vit7b16_ms",
    "dinov3_vit7b16_de",
    "dinov3_vitl16_chmv2",
):
    globals()[_name] = _head_entry(_name)
