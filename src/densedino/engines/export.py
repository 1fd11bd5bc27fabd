"""Owns exports: a backbone as a file for other runtimes, kept only if its tokens there are those of eager float32."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from densedino.checkpoint import atomic_path
from densedino.engines.eager import EagerEngine
from densedino.engines.graph import Graph, Normalise, export_graph
from densedino.engines.onnx import OnnxSession, write_onnx
from densedino.engines.openvino import OpenVINOSession, compile_model, convert_graph, openvino
from densedino.engines.running import float32
from densedino.errors import InputError
from densedino.models.vit import block_indices
from densedino.weights.files import tensors_sha256

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from densedino.models.convnext import ConvNeXt
    from densedino.models.vit import VisionTransformer
    from densedino.weights.card import WeightsCard

__all__ = ["FORMATS", "TOLERANCE", "Exported", "Input", "Sizes", "export_model"]

Format = Literal["onnx", "openvino", "torch"]
Input = Literal["normalised", "unit", "uint8"]
FORMATS: dict[str, str] = {"onnx": ".onnx", "openvino": ".xml", "torch": ".pt2"}
"""File name endings."""
TOLERANCE = 1e-4
"""Largest difference of a token's number, after the final norm, from eager float32."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of the input; None for any."""

    batch: int | None = None
    height: int | None = None
    width: int | None = None


@dataclass(frozen=True)
class Exported:
    """What was written, and how near it is."""

    path: Path
    outputs: tuple[str, ...]
    error: float
    """Largest difference from eager float32, of any output at any size that was tried."""
    checked: tuple[tuple[int, ...], ...]
    """Shapes that were tried; none of them was traced, unless sizes are fixed."""
    metadata: dict[str, str]


def export_model(
    model: VisionTransformer | ConvNeXt,
    card: WeightsCard,
    path: str | os.PathLike[str],
    *,
    to: Format,
    layers: Sequence[int] = (),
    takes: Input = "normalised",
    sizes: Sizes | None = None,
) -> Exported:
    """Write a backbone for another runtime, run it there, compare, and only then put the file in place.

    Args:
        model: the backbone.
        card: of its weights: name, licence and statistics go into the file.
        path: the file; it must not exist. OpenVINO's weights, and ONNX's from 1.9 GB on, stand in a file beside it.
        to: onnx, openvino or torch (`torch.export`).
        layers: blocks whose tokens come out too, after the final norm; negative ones count from the end.
        takes: images "normalised" by mean and std, floats in [0, 1] ("unit"), or bytes ("uint8").
        sizes: of the input, where they are to be fixed.

    Raises:
        InputError: no such format, another file name ending, the path exists, a size that does not fit, or the
            runtime's tokens differ by more than `TOLERANCE`.
        MissingExtraError: the format's packages are not installed.
    """
    target = Path(path).expanduser()
    _check_target(target, to)
    sizes = sizes or Sizes()
    model = float32(model.to("cpu"))
    blocks = list(dict.fromkeys([*block_indices([*layers, -1], model.depth)]))
    before = None if takes == "normalised" else Normalise(mean=card.mean, std=card.std, uint8=takes == "uint8")
    graph = Graph(model, layers=sorted(blocks), before=before)
    metadata = _metadata(graph, card, takes)
    with atomic_path(target) as scratch:
        run = {"onnx": _onnx, "openvino": _openvino, "torch": _torch}[to](graph, scratch, sizes, metadata)
        error, checked = _compare(graph, run, sizes)
        if not error <= TOLERANCE:
            raise InputError(
                f"{target}: its tokens differ by {error:.2g} from those of PyTorch in float32; {TOLERANCE:g} is "
                "allowed. Nothing was written. Fix: another format, or other versions of the runtime."
            )
        for beside in scratch.parent.iterdir():
            if beside != scratch:
                with atomic_path(target.parent / beside.name) as place:
                    shutil.move(beside, place)
    return Exported(target, tuple(graph.names), error, checked, metadata)


def _check_target(target: Path, to: str) -> None:
    if to not in FORMATS:
        raise InputError(f"unknown format {to!r}; valid are {', '.join(FORMATS)}.")
    if target.suffix != FORMATS[to]:
        raise InputError(f"{target}: {to} is written to a {FORMATS[to]} file, and is read by that name. Rename it so.")
    if target.exists():
        raise InputError(f"{target} exists, and nothing is overwritten. Give another path, or remove it first.")


def _metadata(graph: Graph, card: WeightsCard, takes: Input) -> dict[str, str]:
    tensors = {k: v for k, v in graph.model.state_dict().items() if not k.endswith((".bias_mask", ".periods"))}
    what = {
        "normalised": f"float32 RGB, (x / 255 - mean) / std with mean {list(card.mean)}, std {list(card.std)}",
        "unit": "float32 RGB in [0, 1]; normalised inside",
        "uint8": "uint8 RGB; normalised inside",
    }
    return {
        "densedino.card": json.dumps(replace(card, dropped=()).to_dict(), ensure_ascii=False, sort_keys=True),
        "densedino.fingerprint": tensors_sha256(tensors),
        "densedino.input": f"image [B, {card.in_chans}, H, W], H, W multiples of {graph.model.stride}; {what[takes]}",
        "densedino.outputs": "cls [B, D], registers [B, R, D], patches [B, h, w, D], after the final norm",
        "licence": f"{card.licence} {card.licence_url}".strip(),
    }


def _onnx(graph: Graph, path: Path, sizes: Sizes, metadata: dict[str, str]) -> Callable[[Tensor], Sequence[Tensor]]:
    write_onnx(graph, path, batch=sizes.batch, height=sizes.height, width=sizes.width, metadata=metadata)
    return OnnxSession(path)


def _openvino(graph: Graph, path: Path, sizes: Sizes, metadata: dict[str, str]) -> Callable[[Tensor], Sequence[Tensor]]:
    converted = convert_graph(graph, batch=sizes.batch, height=sizes.height, width=sizes.width)
    for key, value in metadata.items():
        converted.set_rt_info(value, ["densedino", key.removeprefix("densedino.")])
    openvino().save_model(converted, path, compress_to_fp16=False)
    return OpenVINOSession(compile_model(path, precision="fp32"))


def _torch(graph: Graph, path: Path, sizes: Sizes, metadata: dict[str, str]) -> Callable[[Tensor], Sequence[Tensor]]:
    exported = export_graph(graph, batch=sizes.batch, height=sizes.height, width=sizes.width)
    torch.export.save(exported, path, extra_files={"densedino.json": json.dumps(metadata, ensure_ascii=False)})
    module: Any = torch.export.load(path).module()
    return module


def _compare(
    graph: Graph, run: Callable[[Tensor], Sequence[Tensor]], sizes: Sizes
) -> tuple[float, tuple[tuple[int, ...], ...]]:
    """Largest difference from the eager engine, at sizes that were not traced."""
    model = graph.model
    eager = EagerEngine(model, device=torch.device("cpu"), precision="fp32")
    shapes = tuple(
        dict.fromkeys(
            (
                sizes.batch or batch,
                model.in_chans,
                sizes.height or rows * model.stride,
                sizes.width or columns * model.stride,
            )
            for batch, rows, columns in ((1, 2, 4), (3, 4, 2), (1, 7, 6))
        )
    )
    worst = 0.0
    for number, shape in enumerate(shapes):
        image = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(number))
        image, pixels = _both(graph, image)
        with torch.no_grad():
            outputs = run(image)
        tokens = eager(pixels, layers=graph.layers)
        wanted = [part for one in tokens for part in (one.cls, one.registers, one.patches) if part.numel()]
        for got, want in zip(outputs, wanted, strict=True):
            if got.shape != want.shape:
                return float("inf"), shapes
            difference = (got - want).abs().max().item()
            worst = max(worst, difference if difference == difference else float("inf"))
    return worst, shapes


def _both(graph: Graph, raw: Tensor) -> tuple[Tensor, Tensor]:
    """Random bytes as the graph takes them, and as the bare model does."""
    unit = raw / 255.0
    if not graph.normalises:
        pixels = unit * 4.0 - 2.0
        return pixels, pixels
    return raw if graph.uint8 else unit, (unit - graph.mean) / graph.std
