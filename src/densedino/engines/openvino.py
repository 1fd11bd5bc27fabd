"""Owns running a backbone through OpenVINO on the CPU: its graph, compiled models, and calls from any thread."""

from __future__ import annotations

import functools
import sys
from collections import deque
from typing import TYPE_CHECKING, Any

import torch

from densedino.engines.artefacts import artefact
from densedino.engines.graph import INPUT, Graph, export_graph, output_names
from densedino.engines.running import GraphEngine, float32, graph_key
from densedino.errors import InputError, require

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from densedino.models.convnext import ConvNeXt
    from densedino.models.vit import VisionTransformer

__all__ = [
    "OpenVINOSession",
    "compile_model",
    "convert_graph",
    "core",
    "has_bf16",
    "openvino",
    "openvino_engine",
    "select",
]

_HINTS = {"fp32": "f32", "bf16": "bf16"}


def openvino() -> Any:
    """The library, without its telemetry: unless told otherwise it would report every use to Intel by the network.

    Raises:
        MissingExtraError: it is not installed; the message names the pip command.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # both libraries then take their stubs
    return require("openvino", extra="engines", purpose="engine 'openvino'")


@functools.cache
def core() -> Any:
    """The one `openvino.Core` of this process, with its CPU plugin, which stays to the end.

    The plugin gives the thread that loads it another stack for signals, and takes it away when it goes: several that
    come and go leave one that is no more, and the next signal, however harmless, kills the process.
    """
    found = openvino().Core()
    found.get_versions("CPU")
    return found


def has_bf16() -> bool:
    """Whether OpenVINO multiplies in bfloat16 on this CPU."""
    return "BF16" in core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def openvino_engine(model: VisionTransformer | ConvNeXt, *, precision: str) -> GraphEngine:
    """The backbone on this CPU; its graph is made at the first call, once per content, and kept in the cache.

    Args:
        model: the backbone.
        precision: fp32, or bf16: matrix products, attention and norms in it, the residual stream in float32.

    Raises:
        MissingExtraError: OpenVINO is not installed.
        InputError: bf16, and this CPU has none.
    """
    openvino()
    if precision == "bf16" and not has_bf16():
        raise InputError(
            "engine 'openvino' has no bfloat16 on this CPU (AVX-512 BF16 or AMX is needed), and would compute in "
            "float32. Use precision='fp32', or 'int8', which every x86 CPU speeds up."
        )
    threads = torch.get_num_threads()

    def build(layers: tuple[int, ...], norm: bool) -> OpenVINOSession:
        names = [name for i in layers for name in output_names(model, i, norm=norm)]
        whole = core().read_model(_kept_graph(model) / "graph.xml")
        return OpenVINOSession(compile_model(select(whole, names), precision=precision, threads=threads))

    return GraphEngine(model.to("cpu"), build, name="openvino", precision=precision, device=torch.device("cpu"))


def _kept_graph(model: VisionTransformer | ConvNeXt) -> Path:
    """The folder with `graph.xml`, which has every output there is."""
    ov = openvino()

    def make(folder: Path) -> None:
        graph = Graph(float32(model), layers=range(model.depth), norms=(True, False))
        ov.save_model(convert_graph(graph), folder / "graph.xml", compress_to_fp16=False)

    return artefact({**graph_key(model), "openvino": ov.__version__}, make)


def convert_graph(
    graph: Graph, *, batch: int | None = None, height: int | None = None, width: int | None = None
) -> Any:
    """An `openvino.Model` of the graph, under its names; sizes that are not given are dynamic.

    Raises:
        InputError: a size that the model cannot take.
        MissingExtraError: OpenVINO is not installed.
    """
    model = openvino().convert_model(export_graph(graph, batch=batch, height=height, width=width))
    model.inputs[0].set_names({INPUT})
    for output, name in zip(model.outputs, graph.names, strict=True):
        output.set_names({name})
    return model


def select(model: Any, names: list[str]) -> Any:
    """An `openvino.Model` with these outputs alone, in this order; what only the others need is gone."""
    ov = openvino()
    outputs = [model.output(name) for name in names]
    results = [ov.opset13.result(output.get_node().input_value(0)) for output in outputs]
    for result, name in zip(results, names, strict=True):
        result.output(0).set_names({name})
    return ov.Model(results, model.get_parameters(), "densedino")


def compile_model(model: Any, *, precision: str, threads: int | None = None, group: int | None = None) -> Any:
    """Compile for this CPU.

    Args:
        model: an `openvino.Model`, or the path of an IR or ONNX file.
        precision: fp32 or bf16: of what is not quantised in the graph.
        threads: cores; all that PyTorch uses if not given.
        group: numbers of an activation that share a scale, where integer weights meet floating-point activations:
            these are then rounded to 8 bits too, as they come.
    """
    hints: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": _HINTS[precision],
        "PERFORMANCE_HINT": "LATENCY",  # one batch at a time on all cores: our batches are made to be large
        "INFERENCE_NUM_THREADS": threads or torch.get_num_threads(),
    }
    if group is not None:
        hints["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = group
    return core().compile_model(model, "CPU", hints)


class OpenVINOSession:
    """A compiled model that any number of threads may call at once."""

    def __init__(self, compiled: Any) -> None:
        self._compiled = compiled
        self._idle: deque[Any] = deque()

    def __call__(self, image: Tensor) -> list[Tensor]:
        """All outputs, in the graph's order."""
        try:
            request = self._idle.pop()
        except IndexError:
            request = self._compiled.create_infer_request()
        try:
            results = request.infer([image.numpy()], share_inputs=True)
            return [torch.from_numpy(results[i]) for i in range(len(results))]
        finally:
            self._idle.append(request)
