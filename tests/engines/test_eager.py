from __future__ import annotations

import copy

import pytest
import torch

from densedino.engines.eager import EagerEngine, choose_device, choose_precision, mixed_bf16
from densedino.errors import InputError
from densedino.models.catalog import create_model, list_models

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", list_models("debug*"))
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_blocks_come_typed_in_float32_in_the_order_asked(name: str, precision: str) -> None:
    model = create_model(name)
    engine = EagerEngine(model, device=CPU, precision=precision)
    last, first = engine(torch.randn(2, 3, 64, 96), layers=(-1, 0))
    assert last.patches.shape == (2, 64 // model.stride, 96 // model.stride, model.embed_dim)
    assert first.cls.ndim == 2
    assert {t.dtype for t in (last.patches, last.cls, last.registers, first.patches)} == {torch.float32}
    assert not last.patches.requires_grad


def test_mixed_precision_leaves_norms_and_the_model_itself_in_float32() -> None:
    model = create_model("debug_vit")
    mixed = mixed_bf16(model)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert mixed.blocks[0].attn.qkv.weight.dtype == torch.bfloat16
    assert mixed.blocks[0].norm1.weight.dtype == mixed.blocks[0].ls1.gamma.dtype == torch.float32


def test_auto_choices() -> None:
    assert choose_device("cpu") == CPU
    assert choose_precision("auto", CPU) == "fp32"
    with pytest.raises(InputError, match="Valid here"):
        choose_device("gpu")


def test_a_model_in_training_mode_is_refused() -> None:
    engine = EagerEngine(create_model("debug_vit").train(), device=CPU, precision="fp32")
    with pytest.raises(InputError, match="training mode"):
        engine(torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_bfloat16_file_runs_like_its_float32_copy(precision):
    half = create_model("debug_vit_swiglu", dtype=torch.bfloat16)
    full = copy.deepcopy(half).float()
    x = torch.randn(2, 3, 32, 48)
    (got,) = EagerEngine(half, device=CPU, precision=precision)(x)
    (wanted,) = EagerEngine(full, device=CPU, precision=precision)(x)
    assert torch.equal(got.patches, wanted.patches)


def test_mixed_precision_shares_what_has_its_type_already():
    half = create_model("debug_vit", dtype=torch.bfloat16)
    mixed = mixed_bf16(half)
    assert mixed.blocks[0].mlp.fc1.weight.data_ptr() == half.blocks[0].mlp.fc1.weight.data_ptr()
    assert mixed.norm.weight.dtype == mixed.rope_embed.periods.dtype == torch.float32
    assert half.norm.weight.dtype == torch.bfloat16 and mixed.blocks is not half.blocks
