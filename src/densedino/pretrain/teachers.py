"""Owns what a student learns features from: any network that makes a token map, of ours, of PyTorch's or of ONNX."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from densedino.errors import InputError, require
from densedino.models.catalog import MODELS
from densedino.weights.catalog import IMAGENET_STATS, WEIGHTS
from densedino.weights.files import tensors_sha256
from densedino.weights.loading import load_weights

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["BackboneTeacher", "ModuleTeacher", "OnnxTeacher", "Teacher", "Tokens", "as_tokens", "open_teacher"]

Statistics = tuple[tuple[float, ...], tuple[float, ...]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Tokens:
    """What a network says of a batch of images."""

    cls: Tensor | None
    """[B, D], or None if it says nothing of whole images."""
    maps: tuple[Tensor, ...]
    """One or several token maps [B, D', h, w], each over the whole image; a pyramid has one for each stride."""

    def summary(self) -> Tensor:
        """[B, D]: the CLS token, or else the mean of the last map."""
        return self.maps[-1].mean((2, 3)) if self.cls is None else self.cls

    def detach(self) -> Tokens:
        """In fp32, without gradient."""
        return Tokens(
            cls=None if self.cls is None else self.cls.detach().float(),
            maps=tuple(m.detach().float() for m in self.maps),
        )


class Teacher(Protocol):
    """A frozen network that is asked for features."""

    @property
    def name(self) -> str:
        """What it is called in reports and cards."""

    @property
    def stride(self) -> int:
        """Pixels that the sides of its input are multiples of."""

    @property
    def fingerprint(self) -> str:
        """Hex digest of all that decides its features besides pixels."""

    def __call__(self, pixels: Tensor, /) -> Tokens:
        """Features of [B, C, H, W] in 0…1, not normalised."""


def as_tokens(output: Any, *, what: str = "the network") -> Tokens:
    """Read what a network returned: maps are its tensors [B, D, h, w], CLS its tensor [B, D]; others are passed over.

    Args:
        output: a tensor, or a sequence or mapping of them in any nesting.
        what: for the error.

    Raises:
        InputError: there is no map.
    """
    found = _tensors(output)
    maps = tuple(x for x in found if x.ndim == 4)
    if not maps:
        shapes = ", ".join(str(tuple(x.shape)) for x in found) or type(output).__name__
        raise InputError(
            f"{what} returned {shapes}; a map of features is [B, D, h, w]. Reshape tokens [B, N, D] to it:"
            " tokens.transpose(1, 2).unflatten(2, (h, w))."
        )
    return Tokens(cls=next((x for x in found if x.ndim == 2), None), maps=maps)


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        output = list(output.values())
    return [x for item in output for x in _tensors(item)] if isinstance(output, tuple | list) else []


class ModuleTeacher:
    """A teacher that is any function of pixels, with the statistics that its input is normalised by.

    Args:
        function: normalised pixels [B, C, H, W] -> what `as_tokens` reads. A module is put in eval mode.
        name: for reports, and for the fingerprint if the function is no module.
        stride: what the sides of its input are multiples of.
        statistics: mean and deviation of each channel, of pixels in 0…1.
    """

    def __init__(
        self,
        function: Callable[[Tensor], Any],
        *,
        name: str,
        stride: int,
        statistics: Statistics = IMAGENET_STATS,
    ) -> None:
        self.function, self.name, self.stride = function, name, stride
        self._mean, self._std = (torch.tensor(values).view(-1, 1, 1) for values in statistics)
        parts = f"{name}/{stride}/{statistics}"
        if isinstance(function, nn.Module):
            function.eval().requires_grad_(False)
            parts += tensors_sha256({k: v.detach().cpu() for k, v in function.state_dict().items()})
        self.fingerprint = hashlib.sha256(parts.encode()).hexdigest()

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tokens:
        """Features of [B, C, H, W] in 0…1."""
        normal = (pixels - self._mean.to(pixels.device)) / self._std.to(pixels.device)
        return as_tokens(self.function(normal), what=f"the teacher {self.name}").detach()


class BackboneTeacher(ModuleTeacher):
    """A backbone of ours.

    Args:
        backbone: a ViT or ConvNeXt of `densedino.models`.
        name: for reports.
        layer: the block whose tokens are the features, without the final norm; None: the final, normalised ones.
        statistics: as `ModuleTeacher`.
    """

    def __init__(
        self, backbone: nn.Module, *, name: str, layer: int | None = None, statistics: Statistics = IMAGENET_STATS
    ) -> None:
        model: Any = backbone
        super().__init__(
            backbone,
            name=name if layer is None else f"{name}, block {layer}",
            stride=model.stride,
            statistics=statistics,
        )
        index = -1 if layer is None else layer

        def features(pixels: Tensor) -> tuple[Tensor, Tensor]:
            ((patches, cls),) = model.get_intermediate_layers(
                pixels, n=[index], reshape=True, return_class_token=True, norm=layer is None
            )
            return cls, patches

        self.function = features


class OnnxTeacher(ModuleTeacher):
    """A tensor of an ONNX graph, its output or any between.

    Args:
        path: of the .onnx file.
        tensor: by name; [B, D, h, w], or tokens [B, 1 + h·w, D] with CLS first, or [B, h·w, D].
        stride: pixels of a token.
        statistics: as `ModuleTeacher`.
        threads: of onnxruntime; None: as many as PyTorch uses.

    Raises:
        MissingExtraError: onnx or onnxruntime is not installed.
        InputError: the graph has no such tensor.
    """

    def __init__(
        self,
        path: Path,
        *,
        tensor: str | None = None,
        stride: int,
        statistics: Statistics = IMAGENET_STATS,
        threads: int | None = None,
    ) -> None:
        onnx = require("onnx", extra="engines", purpose="reading an ONNX teacher")
        onnxruntime = require("onnxruntime", extra="engines", purpose="running an ONNX teacher")
        model = onnx.load(str(path))
        names = [name for node in model.graph.node for name in node.output]
        chosen = tensor or model.graph.output[0].name
        if chosen not in names:
            near = [name for name in names if chosen.lower() in name.lower()][:5] or names[-5:]
            raise InputError(f"{path} has no tensor {chosen!r}; it has, for instance, {', '.join(near)}.")
        if chosen not in [output.name for output in model.graph.output]:
            model.graph.output.append(onnx.helper.make_tensor_value_info(chosen, onnx.TensorProto.FLOAT, None))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        given = session.get_inputs()[0].name

        def features(pixels: Tensor) -> list[Tensor]:
            (values,) = session.run([chosen], {given: pixels.float().cpu().numpy()})
            grid = (pixels.shape[-2] // stride, pixels.shape[-1] // stride)
            return _split(torch.from_numpy(values).to(pixels.device), grid)

        digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        super().__init__(
            features, name=f"{Path(path).name}:{chosen}:{digest[:16]}", stride=stride, statistics=statistics
        )


def _split(values: Tensor, grid: tuple[int, int]) -> list[Tensor]:
    """Tokens [B, extra + h·w, D] as CLS, if there is one, and map; others as they are."""
    if values.ndim != 3:
        return [values]
    extra = values.shape[1] - grid[0] * grid[1]
    if extra < 0:
        raise InputError(f"{values.shape[1]} tokens are less than the {grid[0]}×{grid[1]} of this input and stride.")
    cls = [values[:, 0]] if extra else []
    return [*cls, values[:, extra:].transpose(1, 2).unflatten(2, grid)]


def open_teacher(
    source: str,
    *,
    layer: int | None = None,
    tensor: str | None = None,
    stride: int | None = None,
    statistics: Statistics | None = None,
    device: torch.device | str = "cpu",
) -> Teacher:
    """A teacher by name or file.

    Args:
        source: what `densedino.load` takes, or an .onnx file.
        layer: of a backbone, see `BackboneTeacher`.
        tensor: of an ONNX graph, see `OnnxTeacher`.
        stride: of an ONNX graph; 16 if not given.
        statistics: of an ONNX graph's input; ImageNet's if not given. Weights of ours have their own.
        device: where it runs.

    Raises:
        InputError: options that this kind of teacher has not.
        WeightsError: as `densedino.weights.loading.load_weights`.
    """
    if source.endswith(".onnx"):
        if layer is not None:
            raise InputError(f"layer={layer}: an ONNX graph has tensors, not blocks. Name one: tensor='…'.")
        return OnnxTeacher(
            Path(source).expanduser(), tensor=tensor, stride=stride or 16, statistics=statistics or IMAGENET_STATS
        )
    if tensor is not None or stride is not None or statistics is not None:
        raise InputError(f"tensor, stride and statistics are of ONNX files; {source!r} is none, and knows its own.")
    named = source in MODELS or source in WEIGHTS
    backbone, card = load_weights(
        source if named else None, weights=None if named else source, device=device, dtype=torch.float32
    )
    return BackboneTeacher(backbone, name=card.name, layer=layer, statistics=(card.mean, card.std))
