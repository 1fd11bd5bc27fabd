"""Owns `dd.load_adapter` and the Adapter: a backbone, changed or not, with a head, images in and answers out.

The folder that `densedino adapt` writes:

    adapter.json            task, head, blocks, transform, the backbone's card, score; written last
    head.safetensors        the head's tensors
    lora/                   LoRA or DoRA, as `peft` writes them
    tuned.safetensors       the backbone's tensors that were trained otherwise
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import densedino
from densedino.adapters.heads import HeadConfig, build_head
from densedino.adapters.lora import load_lora, merge_lora, save_lora
from densedino.adapters.tasks import Prediction, Task, answer
from densedino.adapters.tuning import TuneConfig, trained_backbone
from densedino.checkpoint import atomic_path
from densedino.config import from_dict, to_dict
from densedino.engines.choice import build_engine, choose_engine
from densedino.engines.eager import LayerTokens, choose_device
from densedino.errors import InputError, StateDictError, WeightsNotFoundError
from densedino.features.extractor import FeatureExtractor, load
from densedino.images.transforms import Transform
from densedino.weights.card import WeightsCard
from densedino.weights.convert import write_weights
from densedino.weights.loading import load_weights

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    from densedino.images.transforms import Prepared
    from densedino.models.convnext import ConvNeXt
    from densedino.models.vit import VisionTransformer

__all__ = ["Adapter", "AdapterSpec", "load_adapter", "taps_of", "write_adapter"]

DESCRIPTION = "adapter.json"
_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class AdapterSpec:
    """What an adapter is, besides its tensors."""

    task: Task
    head: HeadConfig
    layers: tuple[int, ...]
    """Blocks that the head taps, counted from 0."""
    tune: TuneConfig = field(default_factory=TuneConfig)


def taps_of(model: VisionTransformer | ConvNeXt, pixels: Tensor, layers: Sequence[int]) -> list[LayerTokens]:
    """Tokens of blocks after the final norm, with gradients where they are on."""
    height, width = pixels.shape[2] // model.stride, pixels.shape[3] // model.stride
    blocks = model.get_intermediate_layers(pixels, n=list(layers), return_class_token=True, return_extra_tokens=True)
    found = []
    for patches, cls, registers in blocks:
        finer = round((patches.shape[1] / (height * width)) ** 0.5)  # early ConvNeXt stages have a finer grid
        found.append(LayerTokens(patches.unflatten(1, (height * finer, width * finer)), cls, registers))
    return found


class Adapter:
    """Images in, predictions at the images' own pixels out. Made by `dd.load_adapter`."""

    def __init__(self, dino: FeatureExtractor, head: nn.Module, spec: AdapterSpec) -> None:
        self.dino = dino
        """The backbone as it is now, LoRA merged; it gives features as what `dd.load` makes does."""
        self.head = head
        self.spec = spec

    @property
    def classes(self) -> tuple[str, ...]:
        """Names by number."""
        return self.spec.task.classes

    def __call__(self, images: Any) -> list[Prediction]:
        """Predictions of one image or a list of them, of whatever size (see `FeatureExtractor.__call__`).

        Raises:
            ImageError: an image that cannot be read.
        """
        several = isinstance(images, list | tuple)
        return [self.predict(self.dino.transform(image)) for image in (images if several else [images])]

    def predict(self, prepared: Prepared) -> Prediction:
        """Of a picture that the transform has prepared."""
        transform = self.dino.transform
        geometry = transform.geometry(*prepared.source_size)
        logits = self.logits(prepared.pixels[None])
        return answer(self.spec.task, logits.cpu(), geometry, prepared.source_size, stride=transform.stride)

    @torch.no_grad()
    def logits(self, pixels: Tensor) -> Tensor:
        """Of the head [B, K, h, w], for normalised pixels [B, C, H, W]."""
        taps = self.dino.engine(pixels, layers=list(self.spec.layers))
        return self.head(taps, pixels.to(taps[0].patches.device))

    def save_backbone(self, path: str | os.PathLike[str]) -> None:
        """Write the backbone as it is now, LoRA merged: a file that `dd.load(weights=…)` takes.

        Raises:
            StateDictError: the backbone is not of the table.
        """
        write_weights(self.dino.model.state_dict(), path, card=self.dino.card)

    def __repr__(self) -> str:
        spec = self.spec
        return f"Adapter({spec.task.kind}, {len(self.classes) or 'no'} classes, {spec.head.kind} on {self.dino!r})"


def write_adapter(folder: Path, adapter: Adapter, *, score: Mapping[str, Any]) -> None:
    """Write an adapter whose backbone is as it was trained, LoRA not merged; `adapter.json` comes last.

    Raises:
        OSError: the folder cannot be written.
    """
    model, spec = adapter.dino.model, adapter.spec
    if spec.tune.lora is not None:
        save_lora(model, folder / "lora", spec.tune.lora, base=adapter.dino.card.name)
    elif spec.tune.kind != "frozen":
        _save(trained_backbone(model), folder / "tuned.safetensors")
    _save(adapter.head.state_dict(), folder / "head.safetensors")
    described = {
        "format": _FORMAT,
        "densedino": densedino.__version__,
        "adapter": to_dict(spec),
        "transform": adapter.dino.transform.to_dict(),
        "backbone": adapter.dino.card.to_dict(),
        "score": dict(score),
    }
    with atomic_path(folder / DESCRIPTION) as scratch:
        scratch.write_text(json.dumps(described, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    with atomic_path(path) as scratch:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, scratch)


def load_adapter(
    path: str | os.PathLike[str],
    *,
    weights: str | os.PathLike[str] | None = None,
    device: str | torch.device = "auto",
    engine: str = "auto",
    precision: str = "auto",
) -> Adapter:
    """An adapter that `densedino adapt` wrote, ready for images.

    Args:
        path: its folder.
        weights: of the backbone, if they are not where they were: the same file, as `dd.load` takes it.
        device: as `dd.load`.
        engine: as `dd.load`; "stream" only where the backbone was not changed.
        precision: as `dd.load`.

    Raises:
        WeightsNotFoundError: no adapter there, or its backbone's weights are not found.
        StateDictError: other weights than it was trained on, or tensors that do not fit.
    """
    folder = Path(path)
    values = _read_description(folder)
    spec = from_dict(AdapterSpec, values["adapter"])
    card = WeightsCard.from_dict(values["backbone"])
    source = weights if weights is not None else {"embedded": None}.get(card.source, card.source)
    dino = _load_backbone(folder, spec, card, source, device=device, engine=engine, precision=precision)
    dino = dino.with_transform(Transform(**values["transform"]))
    head = build_head(spec.head, dino.model, spec.task.purpose)
    _fill(head, load_file(folder / "head.safetensors"), folder / "head.safetensors")
    return Adapter(dino, head.to(dino.device).eval(), spec)


def _read_description(folder: Path) -> dict[str, Any]:
    file = folder / DESCRIPTION
    if not file.is_file():
        what = "is no adapter, or of a run that did not end" if folder.is_dir() else "does not exist"
        raise WeightsNotFoundError(
            f"{str(folder)!r} {what}: there is no {DESCRIPTION}. Make one: densedino adapt DATA -o {folder}"
        )
    values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if values["format"] > _FORMAT:
        raise InputError(
            f"{file} is of densedino {values['densedino']}, format {values['format']}; this reads up to {_FORMAT}. "
            "Fix: pip install --upgrade densedino"
        )
    return values


def _load_backbone(
    folder: Path,
    spec: AdapterSpec,
    card: WeightsCard,
    source: Any,
    *,
    device: str | torch.device,
    engine: str,
    precision: str,
) -> FeatureExtractor:
    name = card.name if source in (None, "random") else None
    if spec.tune.kind == "frozen":
        dino = load(name, weights=source, device=device, engine=engine, precision=precision)
        _check_weights(folder, dino.card, card)
        return dino
    chosen = choose_device(device)
    model, found = load_weights(name, weights=source)
    _check_weights(folder, found, card)
    model = model.float()
    if spec.tune.lora is not None:
        load_lora(model, folder / "lora")
        merge_lora(model)
    else:
        _overwrite(model, load_file(folder / "tuned.safetensors"), folder / "tuned.safetensors")
    count = sum(parameter.numel() for parameter in model.parameters())
    choice = choose_engine(engine, precision=precision, device=chosen, parameters=count)
    running = build_engine(choice, model.requires_grad_(requires_grad=False), device=chosen)
    transform = Transform(mean=found.mean, std=found.std, stride=model.stride)
    return FeatureExtractor(running, transform, found, reason=choice.reason)


def _check_weights(folder: Path, found: WeightsCard, wanted: WeightsCard) -> None:
    if found.sha256 != wanted.sha256:
        raise StateDictError(
            f"{folder} was trained on {wanted.name} ({wanted.source}, sha256 {wanted.sha256[:12]}…), and these "
            f"weights are {found.name} ({found.source}, {found.sha256[:12]}…). Pass the former: weights='FILE'."
        )


def _fill(module: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    for name, tensor in tensors.items():  # a k-NN head's bank is as long as it is
        owner, _, leaf = name.rpartition(".")
        if leaf in ("bank", "labels") and hasattr(module.get_submodule(owner), leaf):
            setattr(module.get_submodule(owner), leaf, nn.Buffer(tensor))
    try:
        module.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise StateDictError(f"{path} does not fit the head that {DESCRIPTION} describes: {error}") from error


@torch.no_grad()
def _overwrite(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    parameters = dict(model.named_parameters())
    for name, tensor in tensors.items():
        if name not in parameters or parameters[name].shape != tensor.shape:
            raise StateDictError(f"{path}: {name} {tuple(tensor.shape)} is no parameter of this backbone.")
        parameters[name].copy_(tensor)
