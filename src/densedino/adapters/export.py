"""Owns exporting an adapter: backbone and head as one ONNX file, from pixels to labels, checked before it is kept."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from densedino.checkpoint import atomic_path
from densedino.config import to_dict
from densedino.engines.eager import LayerTokens
from densedino.engines.export import Sizes
from densedino.engines.graph import Graph, Normalise, output_names
from densedino.engines.onnx import OnnxSession, write_onnx
from densedino.engines.running import float32
from densedino.errors import InputError
from densedino.heads.bins import depth_of
from densedino.models.convnext import ConvNeXt

if TYPE_CHECKING:
    import os

    from densedino.adapters.adapted import Adapter

__all__ = ["ExportedAdapter", "HeadGraph", "export_adapter"]

TOLERANCE = 1e-4
"""Largest difference of a logit from PyTorch's, as a share of the largest logit."""
_OUTPUTS = {"segmentation": "labels", "depth": "depth", "classification": "probabilities"}


class HeadGraph(Graph):
    """`image` [B, C, H, W] to the answer and the logits: see `names`."""

    def __init__(self, adapter: Adapter, *, before: Normalise | None = None) -> None:
        """The adapter's backbone must be in memory, as a plain module."""
        super().__init__(float32(adapter.dino.model.to("cpu")), layers=adapter.spec.layers, before=before)
        self.head: nn.Module = adapter.head.to("cpu")
        self.task = adapter.spec.task

    @property
    def names(self) -> list[str]:
        """Labels or depth [B, H, W] of the pixels, or probabilities [B, K]; and the head's logits [B, K, h, w]."""
        return [_OUTPUTS[self.task.kind], "logits"]

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """[B, C, H, W] to what `names` lists; H and W are multiples of the stride."""
        pixels = image.to(torch.float32) / 255.0 if self.uint8 else image
        pixels = (pixels - self.mean) / self.std if self.normalises else pixels
        model = self.model
        tokens = self._convnext(model, pixels) if isinstance(model, ConvNeXt) else self._vit(model, pixels)
        logits = self.head([self._tap(tokens, layer) for layer in self.layers], pixels)
        return self._answer(logits, pixels), logits

    def _tap(self, tokens: dict[str, Tensor], layer: int) -> LayerTokens:
        cls, *registers, patches = (tokens[name] for name in output_names(self.model, layer, norm=True))
        return LayerTokens(patches, cls, registers[0] if registers else cls[:, None, :0])

    def _answer(self, logits: Tensor, pixels: Tensor) -> Tensor:
        size = pixels.shape[2:]
        if self.task.kind == "classification":
            return logits[:, :, 0, 0].softmax(1)
        if self.task.kind == "depth":
            return F.interpolate(depth_of(logits, self.task.bins), size=size, mode="bilinear")[:, 0]
        return F.interpolate(logits, size=size, mode="bilinear").argmax(1)


@dataclass(frozen=True)
class ExportedAdapter:
    """What was written, and how near it is."""

    path: Path
    outputs: tuple[str, ...]
    error: float
    """Largest difference of a logit, as a share of the largest."""
    same_labels: float
    """Share of pixels with the same class, where there are classes; else 1."""
    checked: tuple[tuple[int, ...], ...]


def export_adapter(
    adapter: Adapter,
    path: str | os.PathLike[str],
    *,
    takes: Literal["normalised", "unit", "uint8"] = "normalised",
    sizes: Sizes | None = None,
) -> ExportedAdapter:
    """Write backbone and head as ONNX, run that, compare with PyTorch, and only then put the file in place.

    Args:
        adapter: of `load_adapter`; LoRA is merged there.
        path: ends in .onnx; must not exist.
        takes: images "normalised" by mean and std, floats in [0, 1] ("unit"), or bytes ("uint8").
        sizes: of the input, where they are to be fixed.

    Raises:
        InputError: the path, a size that does not fit, or answers that differ from PyTorch's.
        MissingExtraError: the ONNX packages are not installed.
    """
    target = Path(path).expanduser()
    if target.suffix != ".onnx" or target.exists():
        raise InputError(f"{target}: give the path of a new .onnx file; nothing is overwritten.")
    sizes, card = sizes or Sizes(), adapter.dino.card
    before = None if takes == "normalised" else Normalise(mean=card.mean, std=card.std, uint8=takes == "uint8")
    graph = HeadGraph(adapter, before=before).eval()
    metadata = {
        "densedino.adapter": json.dumps(to_dict(adapter.spec), ensure_ascii=False, sort_keys=True),
        "densedino.card": json.dumps(card.to_dict(), ensure_ascii=False, sort_keys=True),
        "densedino.input": f"image [B, {card.in_chans}, H, W], {takes}; H and W multiples of {graph.model.stride}",
        "licence": f"{card.licence} {card.licence_url}".strip(),
    }
    with atomic_path(target) as scratch:
        write_onnx(graph, scratch, batch=sizes.batch, height=sizes.height, width=sizes.width, metadata=metadata)
        error, same, shapes = _compare(graph, OnnxSession(scratch), sizes)
        if not error <= TOLERANCE:
            raise InputError(
                f"{target}: its logits differ by {error:.2g} of the largest from those of PyTorch; {TOLERANCE:g} is "
                "allowed. Nothing was written. Fix: other versions of onnxruntime or torch."
            )
        beside = scratch.with_name(f"{scratch.name}.data")
        if beside.exists():
            beside.replace(target.with_name(beside.name))
    return ExportedAdapter(target, tuple(graph.names), error, same, shapes)


def _compare(graph: HeadGraph, session: OnnxSession, sizes: Sizes) -> tuple[float, float, tuple[tuple[int, ...], ...]]:
    """Largest relative difference of logits, and the share of equal labels, at sizes that were not traced."""
    stride = graph.model.stride
    shapes = tuple(
        dict.fromkeys(
            (sizes.batch or batch, graph.model.in_chans, sizes.height or rows * stride, sizes.width or columns * stride)
            for batch, rows, columns in ((1, 4, 6), (3, 8, 4))
        )
    )
    worst, equal, pixels = 0.0, 0, 0
    for number, shape in enumerate(shapes):
        image = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(number))
        given = image if graph.uint8 else image / 255.0 if graph.normalises else image / 255.0 * 4 - 2
        answer, logits = session(given)
        with torch.no_grad():
            expected, wanted = graph(given)
        if logits.shape != wanted.shape:
            return float("inf"), 0.0, shapes
        difference = float((logits - wanted).abs().max() / wanted.abs().max().clamp(min=1e-6))
        worst = max(worst, difference if difference == difference else float("inf"))
        if graph.task.kind == "segmentation":
            equal, pixels = equal + int((answer == expected).sum()), pixels + answer.numel()
    return worst, equal / pixels if pixels else 1.0, shapes
