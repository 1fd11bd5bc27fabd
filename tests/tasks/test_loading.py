from __future__ import annotations

from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import pytest
import torch

import densedino as dd
from densedino.errors import InputError, StateDictError, WeightsNotFoundError
from densedino.features.extractor import FeatureExtractor
from densedino.heads.catalog import HEADS
from densedino.tasks.loading import HeadName, head_named
from densedino.tasks.masks import SemanticSegmentor

if TYPE_CHECKING:
    from pathlib import Path

DEBUG = [name for name in HEADS if name.startswith("debug")]


def _load(name: str, files: Path, **options: Any) -> Any:
    return dd.load(name, weights=files / f"{name}.pth", backbone_weights=files / "debug_vit.pth", **options)


def _raw(model: Any) -> list[torch.Tensor]:
    """Everything that the head says of one image."""
    pixels = torch.randn(1, 3, 96, 128, generator=torch.Generator().manual_seed(0))
    headed = model.headed
    if headed.spec.task == "text":
        with torch.no_grad():
            return list(headed.head.encode_image(pixels, headed.tokens_of))
    out = headed.run([pixels[0]] if headed.spec.task == "detect" else pixels)
    out = out[0] if isinstance(out, list) else out
    return [v for v in out.values() if isinstance(v, torch.Tensor)] if isinstance(out, dict) else [out]


@pytest.mark.parametrize("name", DEBUG)
def test_every_head_says_the_same_streamed(name: str, head_files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("densedino.engines.paged._SMALL", 3000)
    eager = _load(name, head_files)
    streamed = _load(name, head_files, engine="stream", precision="fp32", memory="100GB")
    assert name == "debug_vit-lc" or any(parameter.is_meta for parameter in streamed.headed.head.parameters())
    for a, b in zip(_raw(eager), _raw(streamed), strict=True):
        assert torch.allclose(a.float(), b.float(), atol=2e-3), name
    assert not streamed.headed.engine._buffers, "the memory of blocks is the head's"


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["openvino", "onnx"])
def test_other_engines_give_the_taps_too(engine: str, head_files: Path) -> None:
    for a, b in zip(
        _raw(_load("debug_vit-dpt", head_files)), _raw(_load("debug_vit-dpt", head_files, engine=engine)), strict=True
    ):
        assert torch.allclose(a, b, atol=1e-3)


def test_a_joint_file_needs_no_other(head_files: Path) -> None:
    spec = HEADS["debug_vit-m2f"]
    backbone = torch.load(head_files / "debug_vit.pth", weights_only=True)
    joint = torch.load(head_files / "debug_vit-m2f.pth", weights_only=True)
    joint |= {f"{spec.backbone_prefix}{key}": value for key, value in backbone.items()}
    model = dd.load("debug_vit-m2f", weights=joint)
    assert isinstance(model, SemanticSegmentor)
    for a, b in zip(_raw(model), _raw(_load("debug_vit-m2f", head_files)), strict=True):
        assert torch.equal(a, b)


def test_a_missing_backbone_is_said(head_files: Path) -> None:
    with pytest.raises(
        WeightsNotFoundError, match=r"the backbone it stands on, debug_vit, is missing.*backbone_weights="
    ):
        dd.load("debug_vit-m2f", weights=head_files / "debug_vit-m2f.pth")


def test_a_backbone_that_does_not_fit_is_said(head_files: Path) -> None:
    with pytest.raises(
        StateDictError,
        match=r"lc.pth and the backbone .* do not fit: debug_vit-lc stands on debug_vit, and that is debug_vit_swiglu",
    ):
        dd.load(
            "debug_vit-lc",
            weights=head_files / "debug_vit-lc.pth",
            backbone_weights=head_files / "debug_vit_swiglu.pth",
        )


def test_swapped_files_are_said(head_files: Path) -> None:
    with pytest.raises(StateDictError, match=r"holds a backbone, debug_vit. Pass it as backbone_weights="):
        dd.load("debug_vit-lc", weights=head_files / "debug_vit.pth", backbone_weights=head_files / "debug_vit-lc.pth")
    with pytest.raises(StateDictError, match=r"holds the head 'debug_vit-dpt', not a backbone"):
        dd.load(
            "debug_vit-lc", weights=head_files / "debug_vit-lc.pth", backbone_weights=head_files / "debug_vit-dpt.pth"
        )


def test_backbones_load_as_before(head_files: Path) -> None:
    dino = dd.load("debug_vit", weights=head_files / "debug_vit.pth", resize=64)
    assert isinstance(dino, FeatureExtractor) and dino.transform.resize == 64
    with pytest.raises(InputError, match="goes with the name of a head, and 'debug_vit' is none"):
        dd.load("debug_vit", backbone_weights=head_files / "debug_vit.pth")


def test_random_ones_are_marked_and_repeat() -> None:
    first, second = (dd.load("debug_vit-lc", weights="random") for _ in range(2))
    image = np.random.default_rng(0).integers(0, 255, (64, 80, 3), dtype=np.uint8)
    assert torch.equal(first(image)[0].probabilities, second(image)[0].probabilities)
    assert first.headed.untrained and "UNTRAINED" in str(first.headed)


def test_the_references_entry_points_are_names_too() -> None:
    assert head_named("dinov3_vit7b16_ms") is HEADS["vit7b16-ade20k-m2f"]
    assert head_named("vits16") is None and head_named(None) is None


def test_the_released_names_are_known_to_type_checkers() -> None:
    assert set(get_args(HeadName)) == {name for name, spec in HEADS.items() if spec.hub}
