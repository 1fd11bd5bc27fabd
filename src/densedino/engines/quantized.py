"""Owns integer backbones through OpenVINO: calibrated int8, data-free int8 and int4, and the one file they stand in.

The file is safetensors: OpenVINO's weights as bytes, its graph and the weights card in the header. Every output that
the model has is in it, so any layers can be asked of it.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from densedino.checkpoint import atomic_path
from densedino.engines.artefacts import artefact
from densedino.engines.graph import Graph, output_names
from densedino.engines.openvino import OpenVINOSession, compile_model, convert_graph, core, has_bf16, openvino, select
from densedino.engines.running import GraphEngine, float32, graph_key
from densedino.errors import InputError, StateDictError, require
from densedino.models.catalog import create_model
from densedino.weights.card import WeightsCard
from densedino.weights.identity import CARD_KEY
from densedino.weights.shape import pack_spec, spec_of
from densedino.weights.sources import file_sha256

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from densedino.models.catalog import ConvNeXtSpec, ViTSpec
    from densedino.models.convnext import ConvNeXt
    from densedino.models.vit import VisionTransformer

__all__ = [
    "Quantized",
    "calibrate",
    "check_target",
    "compressed_engine",
    "is_quantized",
    "quantized_engine",
    "read_quantized",
    "write_quantized",
]

Bits = Literal["int8", "int4"]
_GRAPH, _BITS, _REPORT = "densedino.openvino", "densedino.precision", "densedino.fidelity"
_WEIGHTS = "openvino.bin"
_GROUP = 64  # numbers that share a scale: of activations, and of int4 weights
_LEAST = 8  # images


@dataclass(frozen=True)
class Quantized:
    """A backbone in integers."""

    graph: Any
    """`openvino.Model` with all outputs."""
    model: VisionTransformer | ConvNeXt
    """Of a file on meta: the weights are in the graph."""
    card: WeightsCard
    precision: Bits
    report: dict[str, Any]
    """How near it is to what it was made from: `features.fidelity.Fidelity` as a mapping."""

    @property
    def nbytes(self) -> int:
        """Of the graph's numbers."""
        return sum(node.get_byte_size() for node in self.graph.get_ops() if node.get_type_name() == "Constant")


def calibrate(model: VisionTransformer | ConvNeXt, images: Sequence[Tensor], *, to: Bits) -> Any:
    """An `openvino.Model` in integers, from what the model does on `images`.

    int8: weights and activations of matrix products, with SmoothQuant (Xiao et al. 2022) at the inputs that follow a
    norm; norms, softmax and the residual stream stay floating point, and attention's products too, where scores in
    8 bits cost more than they gain, and convolutions (the patch embedding, a ConvNeXt's), which are few and on which
    all else rests. int4: weights alone, in groups of 64, scales chosen on the images; layers that
    suffer most stay in int8.

    Args:
        model: the backbone, in float32.
        images: batches [B, C, H, W] of normalised pixels.
        to: int8 or int4.

    Raises:
        InputError: fewer than 8 batches.
        MissingExtraError: NNCF or OpenVINO is not installed.
    """
    nncf = _nncf()
    if len(images) < _LEAST:
        raise InputError(f"{len(images)} images to calibrate on; at least {_LEAST} are needed, and 100 are better.")
    graph = convert_graph(Graph(float32(model.to("cpu")), layers=range(model.depth), norms=(True, False)))
    data = nncf.Dataset([image.numpy() for image in images])
    if to == "int8":
        with contextlib.redirect_stdout(io.StringIO()):
            return nncf.quantize(
                graph,
                data,
                model_type=nncf.ModelType.TRANSFORMER,
                subset_size=len(images),
                ignored_scope=nncf.IgnoredScope(types=["Convolution", "GroupConvolution"], validate=False),
            )
    return _compress(graph, to, calibration=data, images=len(images))


def _nncf() -> Any:
    core()  # before any of NNCF's own
    nncf = require("nncf", extra="engines", purpose="quantising")
    nncf.set_log_level(logging.ERROR)
    return nncf


def _compress(graph: Any, to: Bits, *, calibration: Any = None, images: int = 0) -> Any:
    """Integer weights; with a calibration, int4 that leaves a fifth of the layers, the most sensitive ones, in int8."""
    nncf = _nncf()
    options: dict[str, Any] = {"mode": nncf.CompressWeightsMode.INT8_SYM}
    if to == "int4":
        fallback = nncf.GroupSizeFallbackMode.ADJUST  # for widths that are no multiple of it
        options = {
            "mode": nncf.CompressWeightsMode.INT4_SYM,
            "group_size": _GROUP,
            "advanced_parameters": nncf.AdvancedCompressionParameters(group_size_fallback_mode=fallback),
        }
        if calibration is not None:
            options |= {"ratio": 0.8, "dataset": calibration, "subset_size": images, "scale_estimation": True}
    with contextlib.redirect_stdout(io.StringIO()):
        return nncf.compress_weights(graph, **options)


def compressed_engine(model: VisionTransformer | ConvNeXt, *, precision: Bits) -> GraphEngine:
    """Integer weights without any data; activations are rounded to 8 bits as they come, 64 numbers to a scale.

    Raises:
        MissingExtraError: OpenVINO or NNCF is not installed.
    """
    nncf, ov = _nncf(), openvino()
    model = model.to("cpu")

    def source() -> Any:
        def make(folder: Path) -> None:
            graph = convert_graph(Graph(float32(model), layers=range(model.depth), norms=(True, False)))
            ov.save_model(_compress(graph, precision), folder / "graph.xml", compress_to_fp16=False)

        key = {**graph_key(model), "openvino": ov.__version__, "nncf": nncf.__version__, "weights": precision}
        return core().read_model(artefact(key, make) / "graph.xml")

    return _engine(model, source, precision=precision, dynamic=True)


def quantized_engine(quantized: Quantized) -> GraphEngine:
    """The engine of a file that `write_quantized` wrote."""
    return _engine(
        quantized.model, quantized.graph.clone, precision=quantized.precision, dynamic=quantized.precision == "int4"
    )


def _engine(model: VisionTransformer | ConvNeXt, source: Any, *, precision: Bits, dynamic: bool) -> GraphEngine:
    threads = torch.get_num_threads()
    rest = "bf16" if has_bf16() else "fp32"  # of what is not in integers

    def build(layers: tuple[int, ...], norm: bool) -> OpenVINOSession:
        names = [name for i in layers for name in output_names(model, i, norm=norm)]
        group = _GROUP if dynamic else None
        return OpenVINOSession(compile_model(select(source(), names), precision=rest, threads=threads, group=group))

    return GraphEngine(model, build, name="openvino", precision=precision, device=torch.device("cpu"))


def write_quantized(
    graph: Any,
    path: str | PathLike[str],
    *,
    card: WeightsCard,
    precision: Bits,
    report: str = "",
    spec: ViTSpec | ConvNeXtSpec | None = None,
) -> None:
    """Write a graph in integers as one file, whole or not at all.

    Args:
        graph: of `calibrate`.
        path: a .safetensors file that does not exist yet.
        card: of the weights that it was made from.
        precision: what it was made to.
        report: the fidelity report, JSON.
        spec: of the model, if it is in no table.

    Raises:
        InputError: another file name ending, or the path exists.
    """
    from safetensors.torch import save_file

    target = check_target(path)
    with atomic_path(target) as scratch:
        xml = scratch.with_suffix(".xml")
        openvino().save_model(graph, xml, compress_to_fp16=False)
        note = f"{precision} by densedino quantize from {card.dialect}, SHA-256 {card.sha256}"
        stored = replace(card, notes=(*card.notes, note), dropped=())
        metadata = {
            _GRAPH: xml.read_text(encoding="utf-8"),
            _BITS: precision,
            CARD_KEY: json.dumps(stored.to_dict(), ensure_ascii=False, sort_keys=True),
            "licence": f"{card.licence} {card.licence_url}".strip(),
            _REPORT: report,
            **({} if spec is None else pack_spec(spec)),
        }
        weights = torch.frombuffer(bytearray(xml.with_suffix(".bin").read_bytes()), dtype=torch.uint8)
        save_file({_WEIGHTS: weights}, scratch, metadata=metadata)


def check_target(path: str | PathLike[str]) -> Path:
    """The path, if something may be written there.

    Raises:
        InputError: another file name ending, or the path exists.
    """
    target = Path(path).expanduser()
    if target.suffix != ".safetensors":
        raise InputError(f"{target}: weights are written to a .safetensors file. Rename it so.")
    if target.exists():
        raise InputError(f"{target} exists, and nothing is overwritten. Give another path, or remove it first.")
    return target


def _metadata(weights: object) -> dict[str, str]:
    """Of a safetensors file; nothing if it is anything else."""
    from safetensors import SafetensorError, safe_open

    if not isinstance(weights, str | PathLike) or not str(weights).endswith(".safetensors"):
        return {}
    path = Path(weights).expanduser()
    if not path.is_file():
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except SafetensorError:  # whoever reads it as weights says what is wrong with it
        return {}


def is_quantized(weights: object) -> bool:
    """Whether it is the path of a file that `write_quantized` wrote."""
    return _GRAPH in _metadata(weights)


def read_quantized(path: str | PathLike[str]) -> Quantized:
    """What `write_quantized` wrote.

    Raises:
        StateDictError: it is no such file, or of a newer densedino.
        MissingExtraError: OpenVINO is not installed.
    """
    from safetensors.torch import load_file

    metadata = _metadata(path)
    precision = metadata.get(_BITS)
    if _GRAPH not in metadata or precision not in ("int8", "int4"):
        raise StateDictError(f"{path} holds no quantised model that this densedino knows; write one with `quantize`.")
    card = WeightsCard.from_dict(json.loads(metadata[CARD_KEY]))
    card = replace(card, source=str(path), sha256=file_sha256(Path(path).expanduser()))
    ov = openvino()
    content = load_file(Path(path).expanduser())[_WEIGHTS]
    graph = core().read_model(metadata[_GRAPH].encode(), ov.Tensor(content.numpy()))
    model = create_model(spec_of(card.model, metadata), in_chans=card.in_chans, device="meta")
    return Quantized(graph, model, card, "int8" if precision == "int8" else "int4", _report(metadata))


def _report(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The report that was written with a file; empty if there was none."""
    text = metadata.get(_REPORT, "")
    report: dict[str, Any] = json.loads(text) if text else {}
    return report
