"""LoRA and DoRA: nothing at first, merged is what runs, and peft reads and writes the same files."""

from __future__ import annotations

import copy
import json
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from densedino.adapters.lora import CONFIG, TENSORS, LoraConfig, add_lora, load_lora, lora_layers, merge_lora, save_lora
from densedino.errors import InputError, StateDictError, WeightsNotFoundError
from densedino.models.catalog import create_model

if TYPE_CHECKING:
    from pathlib import Path

PIXELS = torch.randn(2, 3, 48, 32, generator=torch.Generator().manual_seed(0))


def backbone(name: str = "debug_vit") -> nn.Module:
    """With LayerScale 1 and large weights, so that a change of any block is seen."""
    torch.manual_seed(0)
    model = create_model(name)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "gamma" in key:
                parameter.fill_(1.0)
            elif key.endswith("weight") and parameter.ndim == 2:
                parameter.mul_(5)
    return model


def tokens(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.forward_features(PIXELS)["x_norm_patchtokens"]


def stir(model: nn.Module) -> None:
    """Changes that are no longer nothing."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, change in lora_layers(model):
            change.lora_B.normal_(std=0.3, generator=generator)
            if change.magnitude is not None:
                change.magnitude.mul_(torch.rand(change.magnitude.shape, generator=generator) + 0.5)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", ["debug_vit", "debug_vit_swiglu"])
def test_nothing_at_first_and_merged_is_what_runs(name: str, dora: bool) -> None:
    model = backbone(name)
    before, keys = tokens(model), set(model.state_dict())
    assert add_lora(model, LoraConfig(rank=4, dora=dora)) == ["blocks.0.attn.qkv", "blocks.1.attn.qkv"]
    assert (tokens(model) - before).abs().max() <= 1e-6
    stir(model)
    changed = tokens(model)
    assert (changed - before).abs().max() > 0.1
    merge_lora(model)
    assert set(model.state_dict()) == keys
    assert (tokens(model) - changed).abs().max() <= 1e-5


@settings(max_examples=15, deadline=None)
@given(rank=st.integers(1, 6), alpha=st.floats(0.5, 64), seed=st.integers(0, 99))
def test_the_weight_is_what_the_papers_say(rank: int, alpha: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Sequential(nn.Linear(5, 7))
    weight = layer[0].weight.detach().clone()
    add_lora(layer, LoraConfig(rank=rank, alpha=alpha, targets=("0",), dora=True), seed=seed)
    change = dict(lora_layers(layer))["0"]
    with torch.no_grad():
        change.lora_B.normal_(generator=generator)
        change.magnitude.normal_(generator=generator)
    plain = weight + alpha / rank * change.lora_B @ change.lora_A
    expected = change.magnitude[:, None] * plain / plain.norm(dim=1, keepdim=True)
    torch.testing.assert_close(layer[0].weight, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dora", [False, True])
def test_peft_reads_what_we_write(dora: bool, tmp_path: Path) -> None:
    import peft

    model, config = backbone(), LoraConfig(rank=4, alpha=8, targets=("attn.qkv", "mlp.fc1"), dora=dora)
    base = copy.deepcopy(model)
    add_lora(model, config)
    stir(model)
    save_lora(model, tmp_path, config, base="debug_vit")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    assert (tokens(theirs.base_model.model) - tokens(model)).abs().max() <= 1e-4
    assert (theirs.merge_and_unload().blocks[0].attn.qkv.weight - model.blocks[0].attn.qkv.weight).abs().max() <= 1e-5


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.filterwarnings("ignore")  # peft wonders about a model without a name
def test_we_read_what_peft_writes(dora: bool, tmp_path: Path) -> None:
    import peft

    model = backbone()
    options = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["qkv"], use_dora=dora, use_rslora=True, init_lora_weights=False
    )
    theirs = peft.get_peft_model(copy.deepcopy(model), options).eval()
    theirs.save_pretrained(tmp_path)
    assert load_lora(model, tmp_path).dora is dora
    assert (tokens(theirs.base_model.model) - tokens(model)).abs().max() <= 1e-4


def test_written_and_read_again(tmp_path: Path) -> None:
    model, config = backbone(), LoraConfig(dora=True)
    add_lora(model, config)
    stir(model)
    save_lora(model, tmp_path, config, base="debug_vit")
    again = backbone()
    assert load_lora(again, tmp_path) == config
    assert torch.equal(tokens(again), tokens(model))


def test_what_is_no_lora_of_this_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsNotFoundError, match=TENSORS):
        load_lora(backbone(), tmp_path)
    model, config = backbone(), LoraConfig(rank=4)
    add_lora(model, config)
    with pytest.raises(InputError, match="merge_lora"):
        add_lora(model, config)
    save_lora(model, tmp_path, config, base="debug_vit")
    with pytest.raises(StateDictError, match=r"lora_A.weight is of shape \(4, 32\).*needs \(4, 192\)"):
        load_lora(create_model("vitt16"), tmp_path)
    (tmp_path / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 4, "bias": "all"}))
    with pytest.raises(StateDictError, match="bias"):
        load_lora(backbone(), tmp_path)
    with pytest.raises(InputError, match=r"'attn.k_proj' is no linear.*attn.qkv"):
        add_lora(backbone(), LoraConfig(targets=("attn.k_proj",)))
    with pytest.raises(InputError, match="rank 0"):
        LoraConfig(rank=0)
