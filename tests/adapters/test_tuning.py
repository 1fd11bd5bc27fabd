"""What of a backbone is trained, and how fast."""

from __future__ import annotations

import pytest

from densedino.adapters.tuning import TuneConfig, trained_backbone, tune
from densedino.errors import InputError, UnknownNameError
from densedino.models.catalog import create_model


def trained(kind: str, model: str = "debug_vit") -> tuple[set[str], list[dict[str, object]]]:
    backbone = create_model(model)
    groups = tune(backbone, TuneConfig(kind=kind, rank=2))  # type: ignore[arg-type]
    return set(trained_backbone(backbone)), groups


def test_frozen_trains_nothing() -> None:
    assert trained("frozen") == (set(), [])


@pytest.mark.parametrize(("kind", "parts"), [("lora", 2), ("dora", 3)])
def test_low_rank_trains_its_own(kind: str, parts: int) -> None:
    names, groups = trained(kind)
    assert len(names) == 2 * parts and all(".attn.qkv.parametrizations.weight.0." in name for name in names)
    assert sum(len(group["params"]) for group in groups) == len(names)  # type: ignore[arg-type]
    assert {group["lr_multiplier"] for group in groups} == {1.0}


def test_norms_and_biases() -> None:
    names, groups = trained("norm-bias")
    assert "blocks.0.norm1.weight" in names and "blocks.1.mlp.fc2.bias" in names and "blocks.0.ls1.gamma" in names
    assert not any(name.endswith("qkv.weight") or "token" in name for name in names)
    assert {group["wd_multiplier"] for group in groups} == {0.0}
    assert trained("norm-bias", "debug_convnext")[0]


def test_all_with_smaller_steps_towards_the_pixels() -> None:
    backbone = create_model("debug_vit_swiglu")
    groups = tune(backbone, TuneConfig(kind="full", layer_decay=0.5, lr_multiplier=0.1))
    by_parameter = {id(p): group["lr_multiplier"] for group in groups for p in group["params"]}
    rate = {name: by_parameter.get(id(p)) for name, p in backbone.named_parameters()}
    assert rate["norm.weight"] == pytest.approx(0.1)
    assert rate["blocks.1.mlp.w1.weight"] == pytest.approx(0.05)
    assert rate["blocks.0.attn.qkv.weight"] == pytest.approx(0.025)
    assert rate["patch_embed.proj.weight"] == pytest.approx(0.0125)
    assert rate["mask_token"] is None and rate["local_cls_norm.weight"] is None


def test_refused() -> None:
    with pytest.raises(UnknownNameError, match="'lora'"):
        TuneConfig(kind="lorra")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="layer_decay"):
        TuneConfig(layer_decay=0)
    with pytest.raises(InputError, match=r"no linear layer of this model"):
        tune(create_model("debug_convnext"), TuneConfig(kind="lora"))
