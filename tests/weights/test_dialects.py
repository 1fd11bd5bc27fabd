from __future__ import annotations

import random

import pytest
import torch

from densedino.errors import InputError, StateDictError
from densedino.models.catalog import MODELS, ViTSpec
from densedino.weights.dialects import DIALECTS, from_meta, patterns, to_meta

SMALL = ["debug_vit", "debug_vit_swiglu", "debug_convnext"]
UNPLACED = {
    "huggingface": ("rope_embed.", "local_cls_norm.", "norms."),
    "timm": ("rope_embed.", "local_cls_norm.", "norms.", "mask_token"),
}


def place(key, dialect):
    return not key.startswith(UNPLACED.get(dialect, ())) and not (dialect in UNPLACED and key.endswith("bias_mask"))


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("name", SMALL)
def test_there_and_back_is_bit_equal(released, name, dialect):
    state = released(name)
    translated = from_meta({k: v for k, v in state.items() if not k.startswith("norms.")}, dialect)
    back = to_meta(translated)
    expected = {
        k: v for k, v in state.items() if place(k, dialect) and (dialect == "meta" or not k.startswith("norms."))
    }
    assert back.tensors.keys() == expected.keys()
    assert all(torch.equal(back.tensors[key], value) for key, value in expected.items())
    assert back.dialect == ("meta" if dialect == "densedino" else dialect)
    assert back.dropped == () and back.notes == ()
    assert back.convnext == name.endswith("convnext")


@pytest.mark.parametrize("name", SMALL)
def test_names_are_those_of_transformers(released, name):
    import transformers

    spec = MODELS[name]
    if isinstance(spec, ViTSpec):
        config = transformers.DINOv3ViTConfig(
            hidden_size=spec.embed_dim,
            intermediate_size=spec.hidden_dim,
            num_hidden_layers=spec.depth,
            num_attention_heads=spec.num_heads,
            num_register_tokens=spec.num_register_tokens,
            use_gated_mlp=spec.ffn == "swiglu",
            query_bias=spec.qkv_bias,
            value_bias=spec.qkv_bias,
        )
        oracle = transformers.DINOv3ViTModel(config)
    else:
        config = transformers.DINOv3ConvNextConfig(hidden_sizes=list(spec.dims), depths=list(spec.depths))
        oracle = transformers.DINOv3ConvNextModel(config)
    wanted = {key: value.shape for key, value in oracle.state_dict().items()}
    ours = from_meta(released(name), "huggingface")
    old = {
        key.removeprefix("model.") for key in wanted
    }  # what transformers itself writes, and 4.56 to 5.3 have in memory
    assert ours.keys() - {key for key in ours if key.startswith("norms.")} == old
    read = to_meta({key: torch.zeros(shape) for key, shape in wanted.items()})  # the new names
    assert read.tensors.keys() == to_meta(ours).tensors.keys() - {"norms.3.weight", "norms.3.bias"}


@pytest.mark.parametrize(
    ("name", "timm_name", "bias"),
    [
        ("vits16", "vit_small_patch16_dinov3", False),
        ("vits16", "vit_small_patch16_dinov3_qkvb", True),
        ("vits16plus", "vit_small_plus_patch16_dinov3_qkvb", True),
        ("vit7b16", "vit_7b_patch16_dinov3", False),
        ("convnext_tiny", "convnext_tiny.dinov3_lvd1689m", True),
        ("convnext_large", "convnext_large.dinov3_lvd1689m", True),
    ],
)
def test_names_and_shapes_are_those_of_timm(name, timm_name, bias):
    import timm

    from densedino.models.catalog import create_model

    with torch.device("meta"):
        wanted = timm.create_model(timm_name).state_dict()
    ours = from_meta(create_model(name, device="meta").state_dict(), "timm", qkv_bias=bias)
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in wanted.items()}


@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "teacher.backbone.", "model.", "_orig_mod.", "a.b.c."])
@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("name", SMALL)
def test_any_prefix_is_stripped(released, name, dialect, prefix):
    state = from_meta(released(name), dialect)
    back = to_meta({prefix + key: value for key, value in state.items()})
    assert back.tensors.keys() == to_meta(state).tensors.keys()


def test_order_of_keys_does_not_matter(released):
    state = list(from_meta(released("debug_vit"), "huggingface").items())
    random.Random(3).shuffle(state)
    back, straight = to_meta(dict(state)).tensors, to_meta(from_meta(released("debug_vit"), "huggingface")).tensors
    assert all(torch.equal(back[key], straight[key]) for key in straight)


def test_training_checkpoint_gives_its_teacher(released):
    teacher, student = released("debug_vit", seed=1), released("debug_vit", seed=2)
    checkpoint = {
        "iteration": 7,
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3), "step": 4}}, "param_groups": [{"lr": 0.1}]},
        "student": {f"backbone.{key}": value for key, value in student.items()},
        "teacher": {f"backbone.{key}": value for key, value in teacher.items()}
        | {"dino_head.mlp.0.weight": torch.ones(2)},
    }
    back = to_meta(checkpoint)
    assert torch.equal(back.tensors["cls_token"], teacher["cls_token"])
    assert back.notes == ("taken from teacher.backbone.*",)
    rows = dict(back.dropped)
    assert rows.keys() == {"iteration", "optimizer", "student.backbone.*", "teacher.dino_head*"}
    assert "teacher.backbone" in rows["student.backbone.*"]


def test_distilled_average_wins_over_the_big_teacher(released):
    checkpoint = {
        "teacher": {f"backbone.{key}": value for key, value in released("debug_vit_swiglu").items()},
        "model_ema": {f"backbone.{key}": value for key, value in released("debug_vit").items()},
    }
    assert to_meta(checkpoint).tensors.keys() == released("debug_vit").keys()


def test_two_backbones_without_a_reason_to_choose_are_an_error(released):
    state = released("debug_vit")
    both = {f"{side}.{key}": value for side in ("left", "right") for key, value in state.items()}
    with pytest.raises(StateDictError, match=r"several backbones .*'left\.', 'right\.'"):
        to_meta(both)


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({}, "no tensors"),
        ({"fc.weight": torch.ones(2)}, "it has fc.weight"),
        ({"base_model.model.blocks.0.attn.qkv.lora_A.weight": torch.ones(2)}, "LoRA"),
        ({"embeddings.position_embeddings": torch.ones(2)}, "DINOv2"),
    ],
)
def test_no_backbone_is_an_error_that_says_what_it_may_be(state, words):
    with pytest.raises(StateDictError, match=words):
        to_meta(state)


def test_a_missing_part_of_qkv_is_named(released):
    state = from_meta(released("debug_vit"), "huggingface")
    del state["layer.1.attention.k_proj.weight"]
    with pytest.raises(StateDictError, match=r"blocks\.1\.attn\.qkv\.weight: the file has no k part"):
        to_meta(state)


def test_a_key_bias_that_the_dialect_applies_is_an_error(released):
    state = from_meta(released("debug_vit"), "huggingface")
    state["layer.0.attention.k_proj.bias"] = torch.zeros(32)
    to_meta(state)
    state["layer.0.attention.k_proj.bias"][3] = 0.1
    with pytest.raises(StateDictError, match="another model"):
        to_meta(state)


def test_colliding_wrapper_names_are_an_error(released):
    with pytest.raises(StateDictError, match="two tensors"):
        to_meta({"a.weight": torch.ones(1), "_orig_mod.a.weight": torch.ones(1)})


def test_unknown_dialect_is_an_error(released):
    with pytest.raises(InputError, match="lightly"):
        from_meta(released("debug_vit"), "lightly")


def test_patterns_are_listed_once():
    keys = ["blocks.0.x", "blocks.11.x", "norms.3.weight", "stages.1.2", "a.b2.c", "5.x"]
    assert patterns(keys) == ["blocks.*.x", "norms.*.weight", "stages.*.*", "a.b2.c", "5.x"]
