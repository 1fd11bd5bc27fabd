from __future__ import annotations

import pytest
import torch

from densedino.errors import InputError, UnknownNameError
from densedino.models.catalog import MODELS, ViTSpec, create_model, list_models

# reference.md, 1.1 and 1.3: measured on the release
PARAMETERS = {
    "vits16": 21_601_152,
    "vits16plus": 28_697_472,
    "vitb16": 85_669_632,
    "vitl16": 303_154_176,
    "vitl16plus": 403_915_776,
    "vith16plus": 840_633_600,
    "vit7b16": 6_716_043_264,
    "convnext_tiny": 27_820_128,
    "convnext_small": 49_454_688,
    "convnext_base": 87_566_464,
    "convnext_large": 196_230_336,
}
ENTRIES = {
    "vits16": 188,
    "vitb16": 188,
    "vits16plus": 212,
    "vitl16": 368,
    "vitl16plus": 416,
    "vith16plus": 552,
    "vit7b16": 610,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count_is_the_released_one(name: str) -> None:
    model = create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", ENTRIES)
def test_state_dict_has_the_released_number_of_entries(name: str) -> None:
    assert len(create_model(name, device="meta").state_dict()) == ENTRIES[name]


@pytest.mark.parametrize("name", list_models("debug*"))
def test_every_tensor_is_initialised(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is filled with NaN before initialisation; none may be left."""
    plain = torch.nn.Module.to_empty

    def poisoned(module: torch.nn.Module, *, device: object, recurse: bool = True) -> torch.nn.Module:
        plain(module, device=device, recurse=recurse)
        with torch.no_grad():
            for tensor in [*module.parameters(), *module.buffers()]:
                tensor.fill_(float("nan"))
        return module

    monkeypatch.setattr(torch.nn.Module, "to_empty", poisoned)
    model = create_model(name, in_chans=5)
    assert all(torch.isfinite(t).all() for t in model.state_dict().values())
    assert not model.training
    assert model(torch.randn(2, 5, 64, 32)).shape == (2, model.embed_dim)


@pytest.mark.parametrize("name", MODELS)
def test_every_entry_builds_on_meta_and_on_cpu_in_a_dtype(name: str) -> None:
    meta = create_model(name, device="meta", dtype=torch.bfloat16)
    assert {p.device.type for p in meta.parameters()} == {"meta"}
    assert {p.dtype for p in meta.parameters()} == {torch.bfloat16}


def test_the_initialisation_is_the_papers() -> None:
    model = create_model("vitt16")
    weight = model.blocks[3].attn.qkv.weight
    assert abs(weight.std().item() - 0.02) < 0.001
    assert weight.abs().max() < 0.11
    assert (model.blocks[0].ls1.gamma == 1e-5).all()
    assert model.mask_token.count_nonzero() == 0
    assert model.blocks[0].attn.qkv.bias_mask.sum() == 2 * 192


def test_a_variant_is_a_replaced_spec() -> None:
    from dataclasses import replace

    spec = MODELS["vit7b16"]
    assert isinstance(spec, ViTSpec)
    assert create_model(replace(spec, depth=1), device="meta").depth == 1


def test_unknown_name_names_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown model 'vits14'; did you mean 'vits16'"):
        create_model("vits14")
    with pytest.raises(InputError, match="in_chans is 0"):
        create_model("vits16", in_chans=0)


def test_list_models_takes_a_pattern() -> None:
    assert list_models("convnext_*") == ["convnext_tiny", "convnext_small", "convnext_base", "convnext_large"]
    assert len(list_models("vit*")) == 9
