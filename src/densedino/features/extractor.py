"""Owns `dd.load` and the FeatureExtractor: a backbone bound to the transform of its weights."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections import Counter
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from densedino.engines.choice import build_engine, choose_engine
from densedino.engines.eager import LayerTokens, choose_device, choose_precision
from densedino.errors import InputError, UnknownNameError, UntrainedWarning
from densedino.features.tokens import Features, Norm
from densedino.images.transforms import Transform
from densedino.models.vit import block_indices
from densedino.weights.loading import load_weights

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    from densedino.engines.eager import Precision
    from densedino.engines.protocol import Engine
    from densedino.images.transforms import Fit, Prepared, Resize
    from densedino.models.convnext import ConvNeXt
    from densedino.models.vit import VisionTransformer
    from densedino.weights.card import WeightsCard

__all__ = ["FeatureExtractor", "load"]


def load(
    name: str | None = None,
    *,
    weights: str | os.PathLike[str] | Mapping[str, Tensor] | None = None,
    device: str | torch.device = "auto",
    engine: str = "auto",
    precision: str = "auto",
    memory: str | int | None = None,
    device_map: str | Mapping[str, int | str] | None = None,
    offload: str | os.PathLike[str] | None = None,
    merge: float = 0.0,
    resize: Resize = None,
    fit: Fit = "pad",
) -> FeatureExtractor:
    """A model with its own transform, ready to turn images into features.

    Args:
        name: weights (`list_weights()`: "vitl16-sat493m"), an architecture ("vits16"), or nothing: then the file tells,
            or without a file the package's own small model is taken.
        weights: a checkpoint in any dialect: a path, an https:// URL, a Hugging Face or timm hub id, a mapping of
            tensors, or "random" for seeded random weights; or a file that `densedino quantize` wrote.
        device: "auto", "cpu", "cuda", "cuda:1", "mps".
        engine: "auto" (the fastest that is installed: `.engine_reason` says why), "eager" (plain PyTorch), "compile"
            (torch.compile), "openvino" or "onnx" (pip extra `engines`), "stream" (larger than the memory).
        precision: "auto" (bf16 on a GPU that has it, else fp32), "fp32", "bf16", or "int8", "int4" (OpenVINO).
        memory: with engine "stream", what the process may have in RAM at its peak: "3GB".
        device_map: "auto" to spread a ViT's blocks over GPUs, CPU memory and disk, as accelerate finds room; or a
            device for each: {"blocks.0": 0, "blocks.1": "cpu", …}.
        offload: with `device_map`, a folder for the blocks on "disk".
        merge: share of the patches that are merged with one beside them that looks alike, in a ViT, up to 0.75: faster,
            and less exact; tokens come out on the full grid all the same. 0 is off.
        resize: None for the image's own size, N for a short side of N pixels, (H, W) for exactly that.
        fit: what becomes of sizes that are no multiple of the stride: "pad", "crop", "resize" or "error".

    Raises:
        UnknownNameError: no such model, weights, engine or precision.
        WeightsError: the checkpoint is not there, damaged, or of another model than asked.
        InputError: a device, engine or precision that cannot be used, or not together.
        MissingExtraError: the engine's packages are not installed; the message names the pip command.

    Warns:
        UntrainedWarning: the default weights are random, and nobody asked for that (`weights="random"`).
    """
    alone_on_cpu = engine in ("openvino", "stream") or _is_quantized(weights)
    chosen = choose_device("cpu" if device == "auto" and alone_on_cpu else device)
    if device_map is not None or merge:
        if engine not in ("auto", "eager") or memory is not None or (device_map is not None and merge):
            raise InputError("device_map=… and merge=… are for engine='eager', without memory=…, and one at a time.")
        if device_map is not None and device != "auto":
            raise InputError(f"device={str(device)!r}: device_map=… says where blocks go. Leave device out.")
        running, card, reason = _start_eager(
            name, weights, device=chosen, precision=precision, device_map=device_map, offload=offload, merge=merge
        )
    else:
        running, card, reason = _start(name, weights, device=chosen, engine=engine, precision=precision, memory=memory)
    if card.untrained and weights is None:
        message = (
            f"{card.name} is UNTRAINED: its weights are random, and so are its features. Pass weights=… for real ones."
        )
        warnings.warn(message, UntrainedWarning, stacklevel=2)
    transform = Transform(mean=card.mean, std=card.std, stride=running.model.stride, resize=resize, fit=fit)
    return FeatureExtractor(running, transform, card, reason=reason)


def _start(
    name: str | None,
    weights: Any,
    *,
    device: torch.device,
    engine: str,
    precision: str,
    memory: str | int | None,
) -> tuple[Engine, WeightsCard, str]:
    """The engine with its weights, the weights' card, and why this engine."""
    if engine == "stream" or (engine == "auto" and memory is not None):
        choice = choose_engine(engine, precision=precision, device=device, parameters=0, memory=memory is not None)
        from densedino.engines.streamed import DEFAULT_MEMORY, StreamEngine
        from densedino.weights.loading import load_stored

        source = load_stored(name, weights=weights)
        exact: Precision = "fp32" if choice.precision == "fp32" else "bf16"
        return StreamEngine(source, precision=exact, memory=memory or DEFAULT_MEMORY), source.card, choice.reason
    if _is_quantized(weights):
        return _start_quantized(name, weights, device=device, engine=engine, precision=precision)
    # What can be refused is refused before anything is read.
    choose_engine(engine, precision=precision, device=device, parameters=0, memory=memory is not None)
    model, card = load_weights(name, weights=weights)
    count = sum(parameter.numel() for parameter in model.parameters())
    choice = choose_engine(engine, precision=precision, device=device, parameters=count)
    return build_engine(choice, model, device=device), card, choice.reason


def _start_eager(
    name: str | None,
    weights: Any,
    *,
    device: torch.device,
    precision: str,
    device_map: str | Mapping[str, int | str] | None,
    offload: str | os.PathLike[str] | None,
    merge: float,
) -> tuple[Engine, WeightsCard, str]:
    """PyTorch itself, over several devices or with patches merged."""
    if _is_quantized(weights):
        raise InputError(f"{weights} is in integers, for OpenVINO: neither device_map=… nor merge=… is for it.")
    exact = choose_precision(precision, device)
    model, card = load_weights(name, weights=weights)
    if device_map is None:
        from densedino.engines.merged import MergedEngine

        return MergedEngine(model, device=device, precision=exact, merge=merge), card, "patches are to be merged"
    from densedino.engines.placed import PlacedEngine

    placed = PlacedEngine(model, devices=device_map, precision=exact, offload=offload)
    blocks = Counter(str(place) for part, place in placed.places.items() if part.startswith("blocks."))
    return placed, card, "blocks on " + ", ".join(f"{place}: {count}" for place, count in blocks.items())


def _is_quantized(weights: Any) -> bool:
    from densedino.engines.quantized import is_quantized

    return is_quantized(weights)


def _start_quantized(
    name: str | None, weights: Any, *, device: torch.device, engine: str, precision: str
) -> tuple[Engine, WeightsCard, str]:
    """The engine of a file in integers: what it is, the file has decided."""
    from densedino.engines.quantized import quantized_engine, read_quantized

    quantized = read_quantized(weights)
    exact, card = quantized.precision, quantized.card
    if engine not in ("auto", "openvino") or precision not in ("auto", exact) or device.type != "cpu":
        raise InputError(
            f"{card.source} is {card.name} in {exact} for OpenVINO on the CPU; engine {engine!r}, precision "
            f"{precision!r}, device {str(device)!r} was asked. Leave them out, or load the weights it was made from."
        )
    if name not in (None, card.name, card.model):
        raise InputError(f"{name!r} was asked for, but {card.source} is {card.name}. Leave the name out.")
    return quantized_engine(quantized), card, f"the file is in {exact}, for OpenVINO"


class FeatureExtractor:
    """Images in, `Features` out. Made by `dd.load`; the same images give the same features on every call."""

    def __init__(self, engine: Engine, transform: Transform, card: WeightsCard, *, reason: str = "as asked") -> None:
        self.transform = transform
        self.card = card
        self.engine = engine
        self.engine_reason = reason
        """Why this engine, in one line."""

    @property
    def model(self) -> VisionTransformer | ConvNeXt:
        """The backbone, a plain `nn.Module`."""
        return self.engine.model

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return self.engine.device

    @property
    def precision(self) -> str:
        """What matrix products are computed in."""
        return self.engine.precision

    @property
    def numerics(self) -> str:
        """What decides the numbers besides weights and pixels: engines agree in fp32, so there it is that alone.

        In other precisions OpenVINO rounds at other places than PyTorch; merged patches are of their own kind.
        """
        if merge := getattr(self.engine, "merge", 0.0):
            return f"{self.precision}, {merge:g} merged"
        apart = self.precision != "fp32" and self.engine.name == "openvino"
        return f"{self.precision} by {self.engine.name}" if apart else self.precision

    def with_transform(self, transform: Transform) -> FeatureExtractor:
        """The same model with another transform; statistics must stay those of the weights.

        Raises:
            InputError: mean, std or stride are not the weights'.
        """
        for name in ("mean", "std", "stride"):
            if getattr(transform, name) != getattr(self.transform, name):
                raise InputError(
                    f"transform.{name} is {getattr(transform, name)}, but these weights were trained with "
                    f"{getattr(self.transform, name)}. Change other fields: dataclasses.replace(dino.transform, …)."
                )
        return FeatureExtractor(self.engine, transform, self.card, reason=self.engine_reason)

    @property
    def fingerprint(self) -> str:
        """Hex digest of all that decides the numbers: architecture, weights, transform, precision."""
        parts: dict[str, Any] = {
            "model": asdict(self.model.spec),
            "weights": self.card.sha256,
            "transform": self.transform.fingerprint(),
            "precision": self.numerics,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def __call__(
        self, images: Any, *, layers: Sequence[int] = (), norm: Norm = "post", batch_size: int = 8
    ) -> Features:
        """Turn one image or a list of images into features.

        Args:
            images: a path, PIL image, array [H, W], [H, W, C] or [B, H, W, C] (uint8, uint16, float in [0, 1]), tensor
                [C, H, W] or [B, C, H, W] (uint8, float in [0, 1]), or a list of such. Sizes may differ.
            layers: blocks whose tokens are wanted too, in `Features.layers`; negative ones count from the end.
            norm: "post" for tokens after the model's final norm, "pre" for the raw output of the block.
            batch_size: images of one size that are run at once.

        Raises:
            ImageError: an image that cannot be read, or whose values are not what the transform expects.
            InputError: the model is in training mode, or an index is no block.
        """
        prepared = [self.transform(image) for image in _as_list(images)]
        if not prepared:
            raise InputError("no images given; pass a path, an image, or a list of at least one.")
        results: list[Features | None] = [None] * len(prepared)
        by_size: dict[tuple[int, ...], list[int]] = {}
        for i, item in enumerate(prepared):
            by_size.setdefault(tuple(item.pixels.shape), []).append(i)
        for members in by_size.values():
            for start in range(0, len(members), batch_size):
                part = members[start : start + batch_size]
                features = self.run([prepared[i] for i in part], layers=layers, norm=norm)
                for place, i in enumerate(part):
                    results[i] = features if len(part) == len(prepared) else features[place]
        if len(by_size) == 1 and results[0] is results[-1] and results[0] is not None:
            return results[0]
        return _join([one for one in results if one is not None])

    def run(self, prepared: Sequence[Prepared], *, layers: Sequence[int] = (), norm: Norm = "post") -> Features:
        """Features of images that the transform has prepared, all of one padded size, as one batch.

        Raises:
            InputError: the model is in training mode, an index is no block, or the features are not finite.
        """
        block_indices(layers or (-1,), self.model.depth)  # here, so that an error shows what was asked
        if norm not in ("post", "pre"):
            raise UnknownNameError("norm", norm, ["post", "pre"])
        pixels = torch.stack([item.pixels for item in prepared])
        last, *others = self.engine(pixels, layers=(-1, *layers), norm=norm == "post")
        if not torch.isfinite(last.patches.sum()):
            raise InputError(
                f"the model gave features that are not finite (precision {self.precision}, weights {self.card.name}). "
                "Load with precision='fp32'; if that gives the same, the checkpoint is damaged."
            )
        grid = (last.patches.shape[1], last.patches.shape[2])
        return Features(
            patches=last.patches,
            cls=last.cls,
            registers=last.registers,
            valid=torch.stack([item.valid for item in prepared]).to(self.device),
            stride=self.model.stride,
            grids=(grid,) * len(prepared),
            input_sizes=tuple(item.input_size for item in prepared),
            source_sizes=tuple(item.source_size for item in prepared),
            norm=norm,
            layers=dict(zip(layers, others, strict=True)),
        )

    def __repr__(self) -> str:
        untrained = ", UNTRAINED" if self.card.untrained else ""
        return (
            f"FeatureExtractor({self.card.name}{untrained}, weights {self.card.sha256[:8]}, "
            f"{self.device}, {self.engine.name}, {self.precision}, {self.transform})"
        )


def _as_list(images: Any) -> list[Any]:
    if isinstance(images, list | tuple):
        return list(images)
    if isinstance(images, Tensor | np.ndarray) and images.ndim == 4:
        return list(images)
    return [images]


def _join(parts: list[Features]) -> Features:
    """Single images of several sizes as one batch, each in the top left corner of the largest grid."""
    height = max(part.grid[0] for part in parts)
    width = max(part.grid[1] for part in parts)

    def grow(tokens: Tensor, height: int, width: int) -> Tensor:
        out = tokens.new_zeros(1, height, width, *tokens.shape[3:])
        out[:, : tokens.shape[1], : tokens.shape[2]] = tokens
        return out

    layers = {}
    for number, tokens in parts[0].layers.items():
        finer = tokens.patches.shape[1] // parts[0].grid[0]
        layers[number] = LayerTokens(
            patches=torch.cat([grow(p.layers[number].patches, height * finer, width * finer) for p in parts]),
            cls=torch.cat([p.layers[number].cls for p in parts]),
            registers=torch.cat([p.layers[number].registers for p in parts]),
        )
    return replace(
        parts[0],
        patches=torch.cat([grow(p.patches, height, width) for p in parts]),
        cls=torch.cat([p.cls for p in parts]),
        registers=torch.cat([p.registers for p in parts]),
        valid=torch.cat([grow(p.valid, height, width) for p in parts]),
        grids=tuple(g for p in parts for g in p.grids),
        input_sizes=tuple(s for p in parts for s in p.input_sizes),
        source_sizes=tuple(s for p in parts for s in p.source_sizes),
        layers=layers,
    )
