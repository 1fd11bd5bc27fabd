"""Owns running a graph as an engine: a session per set of layers, made at its first call, remade if weights change."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from densedino.engines import graph
from densedino.engines.artefacts import model_digest, model_state
from densedino.engines.eager import LayerTokens
from densedino.errors import InputError
from densedino.models.vit import block_indices
from densedino.weights.sources import file_sha256

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from densedino.models.convnext import ConvNeXt
    from densedino.models.vit import VisionTransformer

    Session = Callable[[Tensor], Sequence[Tensor]]
    """Pixels to the outputs of `graph.Graph`, in its order; any number of threads may call it."""

__all__ = ["GraphEngine", "check_pixels", "float32", "graph_key"]

_KEPT = 8  # sessions of one engine


class GraphEngine:
    """Pixels of one size in, tokens of the asked blocks out, by whatever `build` compiles."""

    def __init__(
        self,
        model: VisionTransformer | ConvNeXt,
        build: Callable[[tuple[int, ...], bool], Session],
        *,
        name: str,
        precision: str,
        device: torch.device,
    ) -> None:
        """Nothing is compiled yet.

        Args:
            model: the backbone; may be on meta, if `build` has the weights from elsewhere.
            build: makes the session of sorted blocks, with or without the final norm.
            name: as in `dd.load(engine=…)`.
            precision: of matrix products.
            device: where pixels go.
        """
        self.model = model
        self.name = name
        self.precision = precision
        self.device = device
        self._build = build
        self._sessions: dict[tuple[tuple[int, ...], bool], Session] = {}
        self._state: tuple[tuple[int, int], ...] = ()
        self._lock = threading.Lock()

    def __call__(self, pixels: Tensor, *, layers: Sequence[int] = (-1,), norm: bool = True) -> list[LayerTokens]:
        """Run [B, C, H, W] (H and W multiples of the stride) and return the blocks `layers`, in that order, float32.

        Raises:
            InputError: the model is in training mode or has been changed in structure, or the input or an index does
                not fit it.
        """
        if self.model.training:
            raise InputError(
                f"the model is in training mode, which engine {self.name!r} does not run: features would differ. "
                "Call .model.eval() first."
            )
        wanted = block_indices(layers, self.model.depth)
        check_pixels(self.model, pixels)
        unique = tuple(sorted(set(wanted)))
        image = pixels.detach().to(self.device, torch.float32, non_blocking=True).contiguous()
        outputs = self._session(unique, norm)(image)
        parts = 3 if self.model.num_register_tokens else 2
        tokens = {block: _typed(outputs[i * parts : (i + 1) * parts]) for i, block in enumerate(unique)}
        return [tokens[block] for block in wanted]

    def _session(self, layers: tuple[int, ...], norm: bool) -> Session:
        with self._lock:
            state = model_state(self.model)
            if state != self._state:  # somebody wrote to the weights: what is compiled has the old ones
                self._sessions.clear()
                self._state = state
            if (layers, norm) not in self._sessions:
                for oldest in list(self._sessions)[: max(0, len(self._sessions) + 1 - _KEPT)]:
                    del self._sessions[oldest]
                self._sessions[layers, norm] = self._build(layers, norm)
            return self._sessions[layers, norm]


def _typed(outputs: Sequence[Tensor]) -> LayerTokens:
    cls, *registers, patches = (output.float() for output in outputs)
    return LayerTokens(patches, cls, registers[0] if registers else cls.new_zeros(len(cls), 0, cls.shape[1]))


def check_pixels(model: VisionTransformer | ConvNeXt, pixels: Tensor) -> None:
    """Refuse what a compiled graph would refuse in its own words, or not at all.

    Raises:
        InputError: not [B, C, H, W] with the model's channels, or H or W no multiple of its stride.
    """
    shape, stride = tuple(pixels.shape), model.stride
    if pixels.ndim != 4 or shape[1] != model.in_chans or not shape[0]:
        raise InputError(f"input of shape {shape}: this model takes [B, {model.in_chans}, H, W].")
    if shape[2] % stride or shape[3] % stride or not shape[2] or not shape[3]:
        raise InputError(
            f"input of {shape[2]}×{shape[3]} pixels: height and width must be multiples of {stride}. "
            "Pad, crop or resize it, or use dd.load(...), which pads and says which patches are real."
        )


def graph_key(model: VisionTransformer | ConvNeXt) -> dict[str, object]:
    """What the graph of a model depends on, for the cache: its weights, our spelling of it, PyTorch's version."""
    return {
        "model": model_digest(model),
        "graph": file_sha256(Path(graph.__file__)),
        "torch": str(torch.__version__),
    }


def float32(model: VisionTransformer | ConvNeXt) -> VisionTransformer | ConvNeXt:
    """The model itself if it is in float32, else a copy that is."""
    if all(parameter.dtype == torch.float32 for parameter in model.parameters()):
        return model
    return copy.deepcopy(model).float()
