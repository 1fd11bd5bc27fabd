"""Every registry entry against transformers and timm: tokens, every layer, gradients, bfloat16.

Widths are the real ones; depth is cut where a full model would not fit a two-core test run (named in the parameter).
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from densedino.models.catalog import MODELS, ViTSpec, create_model

sys.path.insert(0, str(Path(__file__).parent))
from oracles import TIMM, huggingface_convnext, huggingface_vit, timm_vit

DEPTHS = {"vitb16": 12, "vitl16": 4, "vitl16_plain": 2, "vitl16plus": 3, "vith16plus": 2, "vit7b16": 1}
SIZES = [(224, 224), (224, 320), (512, 512)]
SMALL = {"vitt16", "vits16", "vits16plus", "convnext_tiny"}
VITS = [name for name, spec in MODELS.items() if isinstance(spec, ViTSpec) and not name.startswith("debug")]
CASES = [
    pytest.param(
        name, size, marks=[] if name in SMALL or size == (224, 320) else pytest.mark.slow, id=f"{name}-{size[0]}"
    )
    for name in [n for n in MODELS if not n.startswith("debug")]
    for size in SIZES
]


def randomised(name: str) -> torch.nn.Module:
    spec = MODELS[name]
    if isinstance(spec, ViTSpec):
        spec = replace(spec, depth=DEPTHS.get(name, spec.depth))
    model = create_model(spec)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.empty(parameter.shape).normal_(generator=generator)
            if "gamma" in key:
                parameter.copy_(0.2 * noise)
            elif key.endswith("bias") or "token" in key:
                parameter.copy_(0.1 * noise)
            elif parameter.ndim == 1:
                parameter.copy_(1 + 0.1 * noise)
            else:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
    return model


def pixels(size: tuple[int, int], batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))


def tokens(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    out = model.forward_features(x)
    return torch.cat([out["x_norm_clstoken"][:, None], out["x_storage_tokens"], out["x_norm_patchtokens"]], dim=1)


@pytest.mark.parametrize(("name", "size"), CASES)
def test_tokens_and_every_layer_equal_transformers(name: str, size: tuple[int, int]) -> None:
    ours = randomised(name)
    theirs = (huggingface_vit if name in VITS else huggingface_convnext)(ours)
    x = pixels(size)
    with torch.inference_mode():
        want = theirs(x, output_hidden_states=True)
        assert (tokens(ours, x) - want.last_hidden_state).abs().max() <= 1e-5
        if name in VITS:
            layers = ours.get_intermediate_layers(x, n=ours.depth, norm=False, return_class_token=True)
            for (patches, cls), hidden in zip(layers, want.hidden_states[1:], strict=True):
                assert (patches - hidden[:, 1 + ours.num_register_tokens :]).abs().max() <= 1e-5
                assert (cls - hidden[:, 0]).abs().max() <= 1e-5
        else:
            maps = ours.get_intermediate_layers(x, n=4, norm=False, reshape=True)
            for mine, other in zip(maps, want.hidden_states[-4:], strict=True):
                assert (mine - other).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("name", "size"), [case for case in CASES if case.values[0] in VITS and case.values[0] in TIMM]
)
def test_tokens_equal_timm(name: str, size: tuple[int, int]) -> None:
    ours = randomised(name)
    theirs = timm_vit(ours, name)
    x = pixels(size, batch=2)
    with torch.inference_mode():
        assert (tokens(ours, x) - theirs.forward_features(x)).abs().max() <= 1e-5


@pytest.mark.parametrize("name", ["vits16", "vits16plus", "convnext_tiny"])
def test_gradients_equal_transformers(name: str) -> None:
    ours = randomised(name)
    theirs = (huggingface_vit if name.startswith("vit") else huggingface_convnext)(ours)
    weight = torch.randn(ours.embed_dim, generator=torch.Generator().manual_seed(2))
    gradients = []
    for forward in (lambda x: tokens(ours, x), lambda x: theirs(x).last_hidden_state):
        x = pixels((64, 96)).requires_grad_()
        (forward(x) * weight).tanh().sum().backward()
        gradients.append(x.grad)
    assert (gradients[0] - gradients[1]).norm() <= 1e-4 * gradients[1].norm()
    if name.startswith("vit"):
        q, k, v = ours.blocks[3].attn.qkv.weight.grad.chunk(3)
        block = theirs.model.layer[3].attention
        for mine, other in ((q, block.q_proj), (k, block.k_proj), (v, block.v_proj)):
            assert (mine - other.weight.grad).norm() <= 1e-4 * other.weight.grad.norm()


@pytest.mark.parametrize("name", ["vits16", "vits16plus", "vitb16", "convnext_tiny"])
def test_bfloat16_stays_close_to_float32(name: str) -> None:
    from densedino.engines.eager import EagerEngine

    ours = randomised(name)
    x = pixels((224, 320))
    exact, mixed = (
        EagerEngine(ours, device=torch.device("cpu"), precision=precision)(x)[0] for precision in ("fp32", "bf16")
    )
    with torch.inference_mode():
        pure = tokens(ours.bfloat16(), x.bfloat16()).float()
    assert F.cosine_similarity(exact.patches, mixed.patches, dim=-1).min() >= 0.9995
    assert F.cosine_similarity(exact.cls, mixed.cls, dim=-1).min() >= 0.9995
    patches = exact.patches.flatten(1, 2)
    assert F.cosine_similarity(patches, pure[:, -patches.shape[1] :], dim=-1).min() >= 0.9995
