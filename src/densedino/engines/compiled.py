"""Owns running a backbone through `torch.compile`, on a CPU or a GPU; PyTorch keeps what it compiled, by content."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from densedino.engines.eager import mixed_bf16
from densedino.engines.graph import Graph, export_graph
from densedino.engines.running import GraphEngine, float32

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from densedino.models.convnext import ConvNeXt
    from densedino.models.vit import VisionTransformer

__all__ = ["compiled_engine"]


def compiled_engine(model: VisionTransformer | ConvNeXt, *, precision: str, device: torch.device) -> GraphEngine:
    """The backbone as `torch.compile` makes it, with dynamic sizes; compiled at the first call of each set of layers.

    Args:
        model: the backbone.
        precision: fp32, or bf16 as in `EagerEngine`: matrix products alone.
        device: where it runs.
    """
    model = model.to(device)

    def build(layers: tuple[int, ...], norm: bool) -> Callable[[Tensor], tuple[Tensor, ...]]:
        runner = mixed_bf16(model) if precision == "bf16" else float32(model)
        # As exported: sizes are symbols from the start, and PyTorch's limit of recompilations is per program.
        graph = Graph(runner, layers=layers, norms=(norm,))
        compiled = torch.compile(export_graph(graph).module(), dynamic=True)

        def session(image: Tensor) -> tuple[Tensor, ...]:
            narrow = model.stride in image.shape[2:]  # one patch high or wide: outside what an export covers
            with torch.no_grad():
                outputs: tuple[Tensor, ...] = (graph if narrow else compiled)(image)
            return outputs

        return session

    return GraphEngine(model, build, name="compile", precision=precision, device=device)
