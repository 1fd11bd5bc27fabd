"""Adapters on disk: loaded strictly, on the weights they were trained on, by any engine."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file

import densedino as dd
from densedino.adapters.adapted import DESCRIPTION, Adapter, AdapterSpec, load_adapter, taps_of, write_adapter
from densedino.adapters.heads import HeadConfig, build_head
from densedino.adapters.lora import lora_layers
from densedino.adapters.tasks import Task
from densedino.adapters.tuning import TuneConfig, tune
from densedino.errors import StateDictError, WeightsNotFoundError
from densedino.weights.convert import write_weights
from densedino.weights.loading import load_weights

if TYPE_CHECKING:
    from pathlib import Path

TASK = Task(kind="segmentation", classes=("a", "b", "c"))
IMAGE = torch.randint(0, 256, (3, 70, 90), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def written(folder: Path, kind: str = "lora", *, weights: str = "random") -> Adapter:
    """An adapter with changes that are something; not merged."""
    dino = dd.load("debug_vit" if weights == "random" else None, weights=weights, engine="eager", device="cpu")
    config = TuneConfig(kind=kind, rank=2)  # type: ignore[arg-type]
    tune(dino.model, config)
    with torch.no_grad():
        for parameter in dino.model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    head = build_head(HeadConfig(), dino.model, TASK.purpose, seed=1).eval()
    adapter = Adapter(dino, head, AdapterSpec(task=TASK, head=HeadConfig(), layers=(1,), tune=config))
    write_adapter(folder, adapter, score={"metric": "mIoU", "value": 1.0})
    return adapter


@pytest.mark.parametrize("kind", ["frozen", "lora", "dora", "norm-bias", "full"])
def test_what_comes_back_tells_the_same(kind: str, tmp_path: Path) -> None:
    adapter = written(tmp_path, kind)
    again = load_adapter(tmp_path, device="cpu")
    assert again.spec == adapter.spec and again.classes == ("a", "b", "c")
    pixels = torch.randn(1, 3, 64, 48)
    assert (again.logits(pixels) - adapter.logits(pixels)).abs().max() <= 1e-5
    assert not list(lora_layers(again.dino.model))
    (told,) = again(IMAGE)
    assert told.labels is not None and told.labels.shape == (70, 90)


def test_the_merged_backbone_is_weights_like_others(tmp_path: Path) -> None:
    written(tmp_path / "a")
    adapter = load_adapter(tmp_path / "a", device="cpu")
    adapter.save_backbone(tmp_path / "merged.safetensors")
    dino = dd.load(weights=tmp_path / "merged.safetensors", device="cpu")
    assert torch.equal(dino(IMAGE).patches, adapter.dino(IMAGE).patches)


@pytest.mark.slow
def test_engines_tell_the_same(tmp_path: Path) -> None:
    written(tmp_path)
    pixels = torch.randn(1, 3, 64, 48)
    eager, compiled = (load_adapter(tmp_path, device="cpu", engine=engine) for engine in ("eager", "openvino"))
    torch.testing.assert_close(compiled.logits(pixels), eager.logits(pixels), atol=1e-3, rtol=1e-3)


def test_other_weights_are_refused(tmp_path: Path) -> None:
    model, card = load_weights("debug_vit", weights="random")
    write_weights(model.state_dict(), tmp_path / "one.safetensors", card=card)
    with torch.no_grad():
        model.norm.bias.add_(1)
    write_weights(model.state_dict(), tmp_path / "two.safetensors", card=card)
    written(tmp_path / "a", weights=str(tmp_path / "one.safetensors"))
    assert load_adapter(tmp_path / "a")
    (tmp_path / "one.safetensors").rename(tmp_path / "moved.safetensors")
    assert load_adapter(tmp_path / "a", weights=tmp_path / "moved.safetensors")
    with pytest.raises(StateDictError, match="was trained on"):
        load_adapter(tmp_path / "a", weights=tmp_path / "two.safetensors")


def test_what_is_no_adapter_is_said(tmp_path: Path) -> None:
    with pytest.raises(WeightsNotFoundError, match="does not exist"):
        load_adapter(tmp_path / "nothing")
    with pytest.raises(WeightsNotFoundError, match="did not end"):
        load_adapter(tmp_path)
    written(tmp_path)
    head = load_file(tmp_path / "head.safetensors")
    save_file({**head, "extra": torch.zeros(1)}, tmp_path / "head.safetensors")
    with pytest.raises(StateDictError, match=r"head\.safetensors does not fit"):
        load_adapter(tmp_path)
    values = json.loads((tmp_path / DESCRIPTION).read_text())
    (tmp_path / DESCRIPTION).write_text(json.dumps({**values, "format": 99}))
    with pytest.raises(ValueError, match="format 99"):
        load_adapter(tmp_path)


def test_taps_have_gradients_and_are_the_engines() -> None:
    dino = dd.load("debug_convnext", weights="random", engine="eager", device="cpu")
    pixels = torch.randn(1, 3, 64, 96)
    ours, theirs = taps_of(dino.model, pixels, [1, 3]), dino.engine(pixels, layers=[1, 3])
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.patches, other.patches)
        assert one.patches.requires_grad
