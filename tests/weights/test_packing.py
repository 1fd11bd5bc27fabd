from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from densedino.engines.eager import EagerEngine
from densedino.errors import InputError, StateDictError, UnknownNameError
from densedino.models import catalog
from densedino.weights import fitting
from densedino.weights.loading import load_stored, load_weights
from densedino.weights.packing import pack_weights, quantize_groups, unpack_state


@pytest.fixture
def wide(monkeypatch):
    """A small model of a width that divides into groups."""
    spec = replace(catalog.MODELS["debug_vit_swiglu"], name="wide", embed_dim=128, hidden_dim=256)
    monkeypatch.setitem(catalog.MODELS, "wide", spec)
    assert fitting.MODELS is catalog.MODELS
    return "wide"


@pytest.mark.parametrize(("bits", "largest_error"), [(8, 2**-8), (4, 2**-4)])
def test_rounding_is_to_the_nearest_of_a_group(bits, largest_error):
    weight = torch.randn(6, 256)
    weight[0] = 0.0
    values, scales = quantize_groups(weight, bits=bits)
    assert values.dtype == torch.int8 and values.shape == (6, 256 * bits // 8) and scales.shape == (6, 4)
    if bits == 4:
        values = torch.cat([(values << 4) >> 4, values >> 4], dim=1)
    back = (values.float().view(6, 4, 64) * scales.float()[..., None]).view(6, 256)
    range_of_group = weight.view(6, 4, 64).abs().amax(2, keepdim=True)
    error = (back - weight).view(6, 4, 64).abs() / range_of_group.clamp(min=1e-9)
    assert error.max() <= 2.1 * largest_error  # at the short end of the range one step more
    assert error.mean() <= 0.51 * largest_error and not back[0].any()


@pytest.mark.parametrize("bits", [8, 4])
def test_a_packed_file_loads_small_and_near(released, tmp_path, wide, bits):
    state = released(wide)
    save_file(state, tmp_path / "x.safetensors")
    pack_weights(load_stored(weights=tmp_path / "x.safetensors"), tmp_path / "p.safetensors", to=f"int{bits}")
    stored = load_stored(weights=tmp_path / "p.safetensors")
    model, card = load_weights(weights=tmp_path / "p.safetensors")
    assert any(f"int{bits}" in note for note in card.notes) and card == replace(stored.card, notes=card.notes)
    error = 0.01 if bits == 8 else 0.12
    for key, value in model.state_dict().items():
        if key.endswith((".periods", ".bias_mask")):
            continue
        packed = key.startswith("blocks.") and value.ndim == 2
        out = torch.empty(value.shape)
        stored.tensors[key].read(out)
        assert torch.equal(out.bfloat16(), value.bfloat16())
        assert (out - state[key]).norm() <= (error if packed else 0) * state[key].norm()
        assert not packed or stored.tensors[key].nbytes < 1.1 * (bits / 8 + 2 / 64) * value.numel()
        assert not packed or stored.model.get_parameter(key).is_meta


def test_what_cannot_be_packed_or_was_packed_otherwise_is_said(released, tmp_path, wide):
    save_file(released("debug_vit"), tmp_path / "small.safetensors")
    small = load_stored(weights=tmp_path / "small.safetensors")
    with pytest.raises(InputError, match="widths that 128 divides"):
        pack_weights(small, tmp_path / "p.safetensors", to="int8")
    with pytest.raises(UnknownNameError, match="packing 'int3'"):
        pack_weights(small, tmp_path / "p.safetensors", to="int3")
    with pytest.raises(InputError, match=r"Name it p\.safetensors"):
        pack_weights(small, tmp_path / "p.pth", to="int8")
    with pytest.raises(InputError, match="nothing is overwritten"):
        pack_weights(small, tmp_path / "small.safetensors", to="int8")
    save_file(released(wide), tmp_path / "x.safetensors")
    pack_weights(load_stored(weights=tmp_path / "x.safetensors"), tmp_path / "p.safetensors", to="int8")
    state = load_file(tmp_path / "p.safetensors")
    assert unpack_state(state, {})[1] == {}
    with pytest.raises(StateDictError, match="does not know"):
        unpack_state(state, {"densedino.packed": '{"bits": 2}'})
    with pytest.raises(StateDictError, match="damaged"):
        unpack_state(state, {"densedino.packed": "{}"})
    del state["blocks.0.attn.qkv.weight"]
    with pytest.raises(StateDictError, match=r"blocks\.0\.attn\.qkv\.weight is packed"):
        unpack_state(state, {"densedino.packed": '{"bits": 8}'})


def test_packing_to_bfloat16_is_rounding(released, tmp_path):
    state = released("debug_vit_swiglu")
    save_file(state, tmp_path / "x.safetensors")
    stored = load_stored(weights=tmp_path / "x.safetensors")
    path = pack_weights(stored, tmp_path / "p.safetensors", to="bf16")
    for key, value in load_file(path).items():
        matrix = key.startswith("blocks.") and value.ndim == 2
        assert value.dtype == (torch.bfloat16 if matrix else torch.float32)
        assert torch.equal(value, state[key].to(value.dtype)) or key.endswith("periods")
    model, _ = load_weights(weights=path)
    assert model.blocks[0].mlp.w1.weight.dtype == torch.bfloat16 and model.norm.weight.dtype == torch.float32
    x = torch.randn(1, 3, 32, 32)
    (got,) = EagerEngine(model, device=torch.device("cpu"), precision="bf16")(x)
    (wanted,) = EagerEngine(load_weights(weights=state)[0], device=torch.device("cpu"), precision="bf16")(x)
    assert torch.equal(got.patches, wanted.patches)
