"""Adapters as ONNX: pixels in, the same masks out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from densedino.adapters.adapted import Adapter, AdapterSpec
from densedino.adapters.export import HeadGraph, export_adapter
from densedino.adapters.heads import HEADS, HeadConfig, KnnHead, build_head, head_layers
from densedino.adapters.lora import merge_lora
from densedino.adapters.tasks import Task
from densedino.adapters.tuning import TuneConfig, tune
from densedino.engines.onnx import OnnxSession
from densedino.errors import InputError
from densedino.features.extractor import load

if TYPE_CHECKING:
    from pathlib import Path

TASK = Task(kind="segmentation", classes=tuple("abcde"))


def adapter(kind: str = "bn-linear", task: Task = TASK) -> Adapter:
    dino = load("debug_vit", weights="random", engine="eager", device="cpu")
    tune(dino.model, TuneConfig(kind="lora", rank=2))
    with torch.no_grad():
        for p in dino.model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    merge_lora(dino.model)
    config = HeadConfig(kind=kind, width=16)  # type: ignore[arg-type]
    head = build_head(config, dino.model, task.purpose).eval()
    if isinstance(head, KnnHead):
        head.fill(torch.randn(30, 32, generator=torch.Generator().manual_seed(2)), torch.arange(30) % 5)
    return Adapter(dino, head, AdapterSpec(task=task, head=config, layers=head_layers(config, dino.model.depth)))


def test_a_merged_adapter_gives_the_same_masks(tmp_path: Path) -> None:
    """Of bytes, of a size that was not traced, as the Python side gives them."""
    one = adapter()
    done = export_adapter(one, tmp_path / "masks.onnx", takes="uint8")
    assert done.error <= 1e-4 and done.same_labels == 1.0
    image = torch.randint(0, 256, (3, 96, 80), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    labels, logits = OnnxSession(tmp_path / "masks.onnx")(image[None])
    assert torch.equal(labels[0], one(image)[0].labels)
    assert logits.shape == (1, 5, 6, 5)
    with pytest.raises(InputError, match="nothing is overwritten"):
        export_adapter(one, tmp_path / "masks.onnx")


@pytest.mark.parametrize("kind", HEADS)
def test_graphs_tell_what_adapters_tell(kind: str) -> None:
    one = adapter(kind)
    pixels = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    labels, logits = HeadGraph(one)(pixels)
    torch.testing.assert_close(logits, one.logits(pixels), atol=1e-4, rtol=1e-4)
    assert labels.shape == (1, 64, 96)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["knn", "upernet", "dpt", "mask-transformer"])
def test_heads_are_exported(kind: str, tmp_path: Path) -> None:
    assert export_adapter(adapter(kind), tmp_path / "a.onnx").error <= 1e-4


@pytest.mark.slow
def test_depth_and_classes_are_exported(tmp_path: Path) -> None:
    depth = export_adapter(adapter(task=Task(kind="depth")), tmp_path / "d.onnx", takes="unit")
    whole = export_adapter(adapter(task=Task(kind="classification", classes=("a", "b"))), tmp_path / "c.onnx")
    assert depth.outputs == ("depth", "logits") and whole.outputs == ("probabilities", "logits")
