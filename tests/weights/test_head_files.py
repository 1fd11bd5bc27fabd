from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from densedino.errors import StateDictError, WeightsNotFoundError
from densedino.heads.catalog import HEADS, create_head
from densedino.models.catalog import create_model
from densedino.weights.head_files import describe, read_head

if TYPE_CHECKING:
    from pathlib import Path

DEBUG = [name for name in HEADS if name.startswith("debug")]


def _joint(name: str) -> dict[str, torch.Tensor]:
    spec = HEADS[name]
    head = {f"{spec.head_prefix}{key}": value for key, value in create_head(name).state_dict().items()}
    backbone = create_model(spec.backbone).state_dict()
    return head | {f"{spec.backbone_prefix}{key}": value for key, value in backbone.items()}


@pytest.mark.parametrize("name", DEBUG)
def test_alone_wrapped_and_with_its_backbone(name: str, tmp_path: Path) -> None:
    spec = HEADS[name]
    state = create_head(name).state_dict()
    torch.save(state, tmp_path / "alone.pth")
    torch.save({"model": {f"module.{k}": v for k, v in state.items()}, "iteration": 7}, tmp_path / "trained.pth")
    torch.save(_joint(name), tmp_path / "joint.pth")
    alone, trained, joint = (read_head(spec, weights=tmp_path / f"{n}.pth") for n in ("alone", "trained", "joint"))
    for key, value in alone.module().state_dict().items():
        assert torch.equal(value, state[key]) and torch.equal(trained.tensors[key], value)
    assert not alone.backbone and joint.backbone.keys() == create_model(spec.backbone).state_dict().keys()
    assert describe(torch.load(tmp_path / "joint.pth", weights_only=True)) == f"the head {name!r}"


def test_doubled_names_of_the_detector_are_left_out() -> None:
    state = create_head("debug_vit-detr").state_dict()
    doubled = {f"transformer.decoder.{k}": v for k, v in state.items() if k.startswith(("class_embed", "bbox_embed"))}
    assert doubled and read_head(HEADS["debug_vit-detr"], weights={**state, **doubled}).tensors.keys() == state.keys()


def test_what_a_file_holds_is_said() -> None:
    spec = HEADS["debug_vit-m2f"]
    with pytest.raises(StateDictError, match=r"holds the head 'debug_vit-dpt'. Ask for 'debug_vit-dpt', or pass"):
        read_head(spec, weights=create_head("debug_vit-dpt").state_dict())
    with pytest.raises(StateDictError, match=r"a backbone, debug_vit. Pass it as backbone_weights=.*swapped"):
        read_head(spec, weights=create_model("debug_vit").state_dict())
    cut = create_head("debug_vit-m2f").state_dict()
    cut.pop("segmentation_model.0.level_embed")
    with pytest.raises(StateDictError, match=r"1 tensors are missing.*missing is segmentation_model.0.level_embed"):
        read_head(spec, weights=cut)
    other = create_head("debug_vit-lc").state_dict() | {"weight": torch.zeros(7, 5)}
    with pytest.raises(StateDictError, match=r"1 have other shapes; weight is \(7, 5\), not \(7, 64\)"):
        read_head(HEADS["debug_vit-lc"], weights=other)
    damaged = create_head("debug_vit-lc").state_dict() | {"bias": torch.full((7,), torch.nan)}
    with pytest.raises(StateDictError, match="bias holds NaN"):
        read_head(HEADS["debug_vit-lc"], weights=damaged)


def test_a_released_name_tells_how_to_get_the_file(tmp_path: Path) -> None:
    with pytest.raises(WeightsNotFoundError, match=r"ade20k_m2f_head-bf307cb1.pth"):
        read_head(HEADS["vit7b16-ade20k-m2f"])
    with pytest.raises(WeightsNotFoundError, match="no file or folder"):
        read_head(HEADS["debug_vit-lc"], weights=tmp_path / "no.pth")


def test_random_heads_are_the_same_twice_and_leave_the_generator() -> None:
    state = torch.random.get_rng_state()
    first, second = (read_head(HEADS["debug_vit-m2f"], weights="random") for _ in range(2))
    assert all(torch.equal(first.tensors[key], second.tensors[key]) for key in first.tensors)
    assert first.untrained and torch.equal(state, torch.random.get_rng_state())
