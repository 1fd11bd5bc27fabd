"""Owns running a backbone through ONNX Runtime, and writing its graph as an ONNX file."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from typing import TYPE_CHECKING, Any

import torch

from densedino.engines.artefacts import artefact
from densedino.engines.graph import INPUT, Graph, export_graph
from densedino.engines.running import GraphEngine, float32, graph_key
from densedino.errors import InputError, require

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from torch import Tensor

    from densedino.models.convnext import ConvNeXt
    from densedino.models.vit import VisionTransformer

__all__ = ["OPSET", "OnnxSession", "onnx_engine", "write_onnx"]

OPSET = 20
"""Has GELU as one operator; TensorRT 10 and ONNX Runtime from 1.17 read it."""
_ONE_FILE = 1_900_000_000  # bytes; protobuf, and so a file without a second one for the weights, ends at 2 GiB
_PURPOSE = "engine 'onnx'"


def onnx_engine(model: VisionTransformer | ConvNeXt, *, device: torch.device) -> GraphEngine:
    """The backbone in float32; one graph per set of layers is made, once per content, and kept in the cache.

    Raises:
        MissingExtraError: ONNX Runtime or the exporter's packages are not installed.
        InputError: a device that the installed ONNX Runtime does not have.
    """
    runtime = require("onnxruntime", extra="engines", purpose=_PURPOSE)
    exporter = require("onnxscript", extra="engines", purpose=_PURPOSE)
    provider = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}.get(device.type, device.type)
    if provider not in (available := runtime.get_available_providers()):
        raise InputError(
            f"engine 'onnx' on {device}: the installed ONNX Runtime has {', '.join(available)}. "
            "Use device='cpu', or install onnxruntime-gpu in its place."
        )
    model = model.to("cpu")
    threads = torch.get_num_threads()

    def build(layers: tuple[int, ...], norm: bool) -> OnnxSession:
        def make(folder: Path) -> None:
            write_onnx(Graph(float32(model), layers=layers, norms=(norm,)), folder / "graph.onnx")

        key = {**graph_key(model), "onnxscript": exporter.__version__, "opset": OPSET, "layers": layers, "norm": norm}
        return OnnxSession(artefact(key, make) / "graph.onnx", provider=provider, threads=threads)

    return GraphEngine(model, build, name="onnx", precision="fp32", device=torch.device("cpu"))


class OnnxSession:
    """An ONNX file that any number of threads may call at once."""

    def __init__(self, path: Path, *, provider: str = "CPUExecutionProvider", threads: int | None = None) -> None:
        runtime = require("onnxruntime", extra="engines", purpose=_PURPOSE)
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        options.log_severity_level = 3
        self._session: Any = runtime.InferenceSession(str(path), options, providers=[provider])

    @property
    def inputs(self) -> dict[str, list[int | str]]:
        """Shape by name."""
        return {node.name: list(node.shape) for node in self._session.get_inputs()}

    @property
    def outputs(self) -> list[str]:
        """Names, in order."""
        return [node.name for node in self._session.get_outputs()]

    def __call__(self, image: Tensor) -> list[Tensor]:
        """All outputs, in the graph's order."""
        return [torch.from_numpy(value) for value in self._session.run(None, {INPUT: image.numpy()})]


def write_onnx(
    graph: Graph,
    path: Path,
    *,
    batch: int | None = None,
    height: int | None = None,
    width: int | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a graph as ONNX; weights of more than 1.9 GB go to `<path>.data` beside it.

    Args:
        graph: on the CPU.
        path: the file.
        batch: images, if always the same number; as `export_graph`.
        height: pixels, likewise.
        width: likewise.
        metadata: text by name, into the file's metadata.

    Raises:
        MissingExtraError: onnx or onnxscript is not installed.
        InputError: a size that the model cannot take.
    """
    for package in ("onnx", "onnxscript"):
        require(package, extra="engines", purpose="writing ONNX")
    exported = export_graph(graph, batch=batch, height=height, width=width)
    with _quiet():
        program = torch.onnx.export(
            exported, input_names=[INPUT], output_names=graph.names, opset_version=OPSET, dynamo=True, verbose=False
        )
    if program is None:
        raise InputError("PyTorch's exporter gave no ONNX program.")
    for key, value in (metadata or {}).items():
        program.model.metadata_props[key] = value
    size = sum(tensor.nbytes for tensor in graph.state_dict().values())
    program.save(path, external_data=size > _ONE_FILE)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter prints its progress, and warns of its own deprecated parts."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
