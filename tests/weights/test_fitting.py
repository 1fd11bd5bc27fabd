from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from densedino.errors import StateDictError
from densedino.models.catalog import MODELS, create_model
from densedino.models.vit import VisionTransformer
from densedino.weights.dialects import from_meta, to_meta
from densedino.weights.fitting import fit, infer_spec

SMALL = ["debug_vit", "debug_vit_swiglu", "debug_convnext"]


def fitted(state, **options):
    return fit(to_meta(state), **options)


@pytest.mark.parametrize("name", MODELS)
def test_architecture_is_told_from_shapes(name):
    state = create_model(name, in_chans=5, device="meta").state_dict()
    assert infer_spec(state) == (MODELS[name], 5)


@pytest.mark.parametrize("dialect", ["meta", "huggingface", "timm"])
@pytest.mark.parametrize("name", SMALL)
def test_module_takes_the_state_strictly(released, name, dialect):
    state, _ = fitted(from_meta({k: v for k, v in released(name).items() if "norms" not in k}, dialect)).module_state()
    model = create_model(name, device="meta")
    model.load_state_dict(state, strict=True, assign=True)
    assert not any(tensor.is_meta for tensor in model.state_dict().values())


def test_what_is_dropped_is_listed_with_the_reason(released):
    state, dropped = fitted(released("debug_vit", sat=True) | {"head.weight": torch.ones(2, 2)}).module_state()
    rows = dict(dropped)
    assert rows.keys() == {"head.*", "blocks.*.attn.qkv.bias_mask", "rope_embed.periods", "local_cls_norm.*"}
    assert "training" in rows["local_cls_norm.*"] and "bfloat16" in rows["rope_embed.periods"]
    assert "local_cls_norm.weight" not in state
    (row,) = fitted(released("debug_convnext")).dropped
    assert row == ("norms.3.*", "second copy of norm.*, and equal to it")


def test_what_dialects_leave_out_is_filled_and_said(released):
    got = fitted(from_meta(released("debug_vit_swiglu"), "timm"))
    assert got.tensors["mask_token"].count_nonzero() == 0
    assert torch.equal(got.tensors["local_cls_norm.weight"], torch.ones(32))
    assert [note.split()[0] for note in got.notes] == ["mask_token", "local_cls_norm"]
    plain = fitted(from_meta(released("debug_vit", zero_bias=True), "timm", qkv_bias=False))
    assert plain.tensors["blocks.1.attn.qkv.bias"].count_nonzero() == 0
    assert any("qkv.bias" in note for note in plain.notes)


def test_periods_are_recomputed_exactly(released):
    state, _ = fitted(released("debug_vit")).module_state()
    exact = create_model("debug_vit").rope_embed.periods
    assert torch.equal(state["rope_embed.periods"], exact)
    assert not torch.equal(released("debug_vit")["rope_embed.periods"], exact)


@pytest.mark.parametrize("base", [50.0, 98.0, 103.0, 10_000.0])
def test_another_rope_base_is_an_error(released, base):
    state = released("debug_vit")
    count = state["rope_embed.periods"].numel()
    state["rope_embed.periods"] = base ** (torch.arange(count) / count)
    with pytest.raises(StateDictError, match="RoPE base"):
        fitted(state)


def test_other_heads_are_an_error(released):
    state = released("debug_vit")
    state["rope_embed.periods"] = 100.0 ** (torch.arange(8) / 8)  # head size 32: one head instead of two
    with pytest.raises(StateDictError, match="number of heads"):
        fitted(state)


@pytest.mark.parametrize("mask", ["right", "nan"])
def test_a_masked_key_bias_is_dropped_and_listed(released, mask):
    state = released("debug_vit", key_bias=True)
    if mask == "nan":
        state |= {k: torch.full_like(v, float("nan")) for k, v in state.items() if k.endswith("bias_mask")}
    got = fitted(state)
    loaded, dropped = got.module_state()
    assert ("blocks.*.attn.qkv.bias", "key part: masked to zero by bias_mask") in dropped
    assert loaded["blocks.0.attn.qkv.bias"][32:64].count_nonzero() == 0
    assert torch.equal(got.tensors["blocks.0.attn.qkv.bias"], state["blocks.0.attn.qkv.bias"])  # conversion keeps it
    expected = torch.tensor([1.0, 0.0, 1.0]).repeat_interleave(32)
    assert torch.equal(loaded["blocks.0.attn.qkv.bias_mask"], expected)


def test_a_key_bias_without_a_mask_is_an_error(released):
    state = {k: v for k, v in released("debug_vit", key_bias=True).items() if not k.endswith("bias_mask")}
    with pytest.raises(StateDictError, match="mask_k_bias"):
        fitted(state)


def test_another_mask_is_an_error(released):
    state = released("debug_vit")
    state["blocks.0.attn.qkv.bias_mask"] = torch.ones(96)
    with pytest.raises(StateDictError, match="bias_mask is not"):
        fitted(state)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", SMALL)
def test_a_value_that_is_not_finite_is_named(released, name, value):
    state = released(name)
    state["norm.bias"] = state["norm.bias"].clone()
    state["norm.bias"][3] = value
    state.pop("norms.3.bias", None)
    with pytest.raises(StateDictError, match=r"NaN or infinity in norm\.bias"):
        fitted(state)


def test_two_norms_that_differ_are_an_error(released):
    state = released("debug_convnext")
    state["norms.3.weight"][0] += 1
    with pytest.raises(StateDictError, match=r"norms\.3\.weight and norm\.weight differ"):
        fitted(state)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"blocks.1.ls2.gamma": None}, r"missing: blocks\.\*\.ls2\.gamma"),
        ({"blocks.1.surprise": torch.ones(3)}, r"not known: blocks\.\*\.surprise"),
        ({"cls_norm.weight": torch.ones(32)}, "not known: cls_norm.weight"),
        ({"norm.weight": torch.ones(31)}, r"norm\.weight \[31\] instead of \[32\]"),
        ({"pos_embed": torch.ones(1, 5, 32)}, "DINOv2"),
        ({"norm.weight": torch.ones(32, dtype=torch.int8)}, r"norm\.weight \(int8\)"),
        ({"norm.weight": torch.ones(32, device="meta")}, "without data"),
        (
            {"storage_tokens": torch.ones(1, 8, 32)},
            "num_register_tokens 8.*nearest is debug_vit.*num_register_tokens 4",
        ),
        ({"storage_tokens": None}, "num_register_tokens 0"),
        ({"blocks.0.mlp.fc1.weight": None}, "fc1.weight"),
        ({"blocks.2.ls1.gamma": torch.ones(32)}, "depth 3.*nearest is debug_vit.*depth 2"),
        ({"patch_embed.proj.weight": torch.ones(32, 3, 14, 14)}, "patch_size 14"),
    ],
)
def test_what_does_not_fit_is_listed(released, change, words):
    state = {key: value for key, value in {**released("debug_vit"), **change}.items() if value is not None}
    with pytest.raises(StateDictError, match=words):
        fitted(state)


def test_a_variant_that_is_in_no_table_names_the_nearest():
    spec = replace(MODELS["vitb16"], name="huge", embed_dim=1152, depth=27, num_heads=18, hidden_dim=4304)
    with torch.device("meta"):
        state = VisionTransformer(spec).state_dict()
    with pytest.raises(StateDictError, match=r"embed_dim 1152, depth 27, hidden_dim 4304.*nearest is"):
        infer_spec(state)


def test_a_model_without_qkv_bias_takes_zeros_only(released):
    state = released("debug_vit_swiglu")
    state |= {f"blocks.{i}.attn.qkv.bias": torch.zeros(96) for i in range(2)}
    assert ("blocks.*.attn.qkv.bias", "all zero, and debug_vit_swiglu has none") in fitted(state).dropped
    state["blocks.0.attn.qkv.bias"][0] = 1.0
    with pytest.raises(StateDictError, match="has no qkv bias"):
        fitted(state)


def test_kept_tensors_take_their_place(released):
    state = released("debug_vit")
    kept = {key: state[key] for key in ("mask_token", "rope_embed.periods")}
    got = fitted(from_meta(state, "timm"), kept=kept)
    assert all(torch.equal(got.tensors[key], value) for key, value in state.items())
    assert got.notes == ()
