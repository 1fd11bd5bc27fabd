"""Owns `dd.load`: a backbone with its transform, or by the name of a released head, the head on its backbone."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from densedino.errors import DenseDinoError, InputError, StateDictError, UntrainedWarning, WeightsNotFoundError
from densedino.features import extractor
from densedino.heads.catalog import HEADS, create_head
from densedino.tasks.boxes import ObjectDetector
from densedino.tasks.classes import Classifier
from densedino.tasks.depth import DepthEstimator
from densedino.tasks.headed import Headed
from densedino.tasks.masks import SemanticSegmentor
from densedino.tasks.texts import TextReader

if TYPE_CHECKING:
    import os

    import torch
    from torch import Tensor, nn

    from densedino.features.extractor import FeatureExtractor
    from densedino.heads.catalog import HeadSpec
    from densedino.images.transforms import Fit, Resize
    from densedino.weights.head_files import HeadFile

__all__ = ["HeadModel", "head_named", "load", "load_headed"]

HeadModel = Classifier | DepthEstimator | SemanticSegmentor | ObjectDetector | TextReader


def head_named(name: str | None) -> HeadSpec | None:
    """The row of the table of heads that `name` means (its name, or the reference's entry point), if it is one."""
    return next((spec for spec in HEADS.values() if name and name in (spec.name, spec.hub)), None)


HeadName = Literal[
    "vit7b16-imagenet1k-linear",
    "vit7b16-synthmix-dpt",
    "vit7b16-ade20k-m2f",
    "vit7b16-coco2017-detr",
    "vitl16-chmv2-dpt",
    "vitl16-dinotxt",
]
"""The released heads, for type checkers; all are in `list_heads()`."""


@overload
def load(  # type: ignore[overload-overlap]  # these names are strings too
    name: HeadName,
    *,
    weights: str | os.PathLike[str] | Mapping[str, Tensor] | None = None,
    backbone_weights: str | os.PathLike[str] | Mapping[str, Tensor] | None = None,
    device: str | torch.device = "auto",
    engine: str = "auto",
    precision: str = "auto",
    memory: str | int | None = None,
    resize: Resize = None,
) -> HeadModel: ...
@overload
def load(
    name: str | None = None,
    *,
    weights: str | os.PathLike[str] | Mapping[str, Tensor] | None = None,
    backbone_weights: str | os.PathLike[str] | Mapping[str, Tensor] | None = None,
    device: str | torch.device = "auto",
    engine: str = "auto",
    precision: str = "auto",
    memory: str | int | None = None,
    resize: Resize = None,
    fit: Fit = "pad",
) -> FeatureExtractor: ...
def load(
    name: str | None = None,
    *,
    weights: str | os.PathLike[str] | Mapping[str, Tensor] | None = None,
    backbone_weights: str | os.PathLike[str] | Mapping[str, Tensor] | None = None,
    device: str | torch.device = "auto",
    engine: str = "auto",
    precision: str = "auto",
    memory: str | int | None = None,
    device_map: str | Mapping[str, int | str] | None = None,
    offload: str | os.PathLike[str] | None = None,
    merge: float = 0.0,
    resize: Resize = None,
    fit: Fit = "pad",
) -> HeadModel | FeatureExtractor:
    """A model ready to be given images: a backbone with its own transform, or a released head on its backbone.

    Args:
        name: weights (`list_weights()`: "vitl16-sat493m"), an architecture ("vits16"), a head (`list_heads()`:
            "vit7b16-ade20k-m2f"), or nothing: then the file tells, or without a file the package's own small model.
        weights: a checkpoint in any dialect: a path, an https:// URL, a Hugging Face or timm hub id, a mapping of
            tensors, or "random" for seeded random weights; or a file that `densedino quantize` wrote. Of a head, the
            head's file, which may hold the backbone too.
        backbone_weights: with the name of a head, the backbone's checkpoint, like `weights`.
        device: "auto", "cpu", "cuda", "cuda:1", "mps".
        engine: what runs the backbone: "auto" (the fastest that is installed: `.engine_reason` says why), "eager"
            (plain PyTorch), "compile" (torch.compile), "openvino" or "onnx" (pip extra `engines`), "stream" (larger
            than the memory; then a head's large tensors too are read layer by layer).
        precision: of the backbone: "auto" (bf16 on a GPU that has it, else fp32), "fp32", "bf16", or "int8", "int4"
            (OpenVINO). A head is always computed in fp32.
        memory: with engine "stream", what the process may have in RAM at its peak: "3GB".
        device_map: of a backbone: "auto" to spread a ViT's blocks over GPUs, CPU and disk, or a device for each block.
        offload: with `device_map`, a folder for the blocks on "disk".
        merge: of a backbone: share of a ViT's patches, up to 0.75, that are run as one with a like one beside them.
        resize: None for the image's own size, or with a head for the size that was published; N for a short side of N
            pixels, (H, W) for exactly that.
        fit: of a backbone: sizes that are no multiple of the stride: "pad", "crop", "resize" or "error".

    Returns:
        A `FeatureExtractor`; or for a head a `Classifier`, `DepthEstimator`, `SemanticSegmentor`, `ObjectDetector` or
        `TextReader`.

    Raises:
        UnknownNameError: no such model, weights, engine or precision.
        WeightsError: a checkpoint is not there, damaged, or of another model than asked; or the two do not fit.
        InputError: a device, engine or precision that cannot be used, or not together.
        MissingExtraError: the engine's packages are not installed; the message names the pip command.

    Warns:
        UntrainedWarning: the default weights are random, and nobody asked for that (`weights="random"`).
    """
    spec = head_named(name)
    how: dict[str, Any] = {"device": device, "engine": engine, "precision": precision, "memory": memory}
    if spec is None and backbone_weights is not None:
        heads = ", ".join(HEADS)
        raise InputError(f"backbone_weights= goes with the name of a head, and {name!r} is none. Heads: {heads}.")
    if spec is None:
        where: dict[str, Any] = {"device_map": device_map, "offload": offload, "merge": merge}
        return extractor.load(name, weights=weights, resize=resize, fit=fit, **how, **where)
    if device_map is not None or merge:
        raise InputError(f"device_map=… and merge=… are for backbones alone; {spec.name} is a head on one.")
    headed = load_headed(spec, weights=weights, backbone_weights=backbone_weights, **how)
    return _task(headed, resize)


def _task(headed: Headed, resize: Resize) -> HeadModel:
    match headed.spec.task:
        case "classify":
            return Classifier(headed, resize)
        case "depth":
            return DepthEstimator(headed, resize)
        case "segment":
            return SemanticSegmentor(headed, resize)
        case "detect":
            return ObjectDetector(headed, resize)
        case "text":
            if resize is not None:
                raise InputError(f"resize={resize}: {headed.spec.name} has sizes of its own, for images and for maps.")
            return TextReader(headed)


def load_headed(
    spec: HeadSpec,
    *,
    weights: str | os.PathLike[str] | Mapping[str, Tensor] | None = None,
    backbone_weights: str | os.PathLike[str] | Mapping[str, Tensor] | None = None,
    device: str | torch.device = "auto",
    engine: str = "auto",
    precision: str = "auto",
    memory: str | int | None = None,
) -> Headed:
    """A head on its backbone, without the pictures. Arguments and errors as `load`."""
    from densedino.weights.head_files import read_head

    file = read_head(spec, weights=weights)
    dino = _backbone(spec, file, backbone_weights, device=device, engine=engine, precision=precision, memory=memory)
    streams = dino.engine.name == "stream"
    head = _paged(file) if streams else file.module().to(device=dino.device).float()
    return Headed(spec, head.eval(), dino.engine, dino.card, file.source, file.sha256, file.notes)


def _paged(file: HeadFile) -> nn.Module:
    from densedino.engines.paged import page
    from densedino.weights.stored import locate

    head = create_head(file.spec, device="meta")
    page(head, locate({key: (value,) for key, value in file.tensors.items()}))
    return head


def _backbone(
    spec: HeadSpec,
    file: HeadFile,
    weights: Any,
    *,
    device: str | torch.device,
    engine: str,
    precision: str,
    memory: str | int | None,
) -> FeatureExtractor:
    """The backbone from its own file, the head's, or the cache; it must be the one the head was trained on."""
    asked = weights
    if weights is None:
        asked = file.backbone or ("random" if file.untrained else None)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UntrainedWarning)
            return extractor.load(
                spec.backbone_weights, weights=asked, device=device, engine=engine, precision=precision, memory=memory
            )
    except WeightsNotFoundError as error:
        if weights is not None:
            raise
        raise WeightsNotFoundError(
            f"the head {spec.name} ({file.source}) is read, but the backbone it stands on, {spec.backbone_weights}, is "
            f"missing: the file does not hold it. Pass it as backbone_weights=. {error}"
        ) from error
    except StateDictError as error:
        raise StateDictError(_misfit(spec, file, asked, error)) from error


def _misfit(spec: HeadSpec, file: HeadFile, weights: Any, error: DenseDinoError) -> str:
    """Which two do not fit, and what would."""
    name = "the mapping" if isinstance(weights, Mapping) else str(weights)
    needs = f"{spec.name} stands on {spec.backbone_weights}"
    found = _what(weights)
    if found is not None and found.startswith("the head"):
        return (
            f"backbone_weights: {name} holds {found}, not a backbone. {needs}: pass that as backbone_weights=, and "
            "heads as weights=."
        )
    if found is None:
        return f"the head {file.source} and the backbone {name} do not fit: {needs}. {error}"
    held = found.rpartition(" ")[2]
    others = [other.name for other in HEADS.values() if other.backbone == held != spec.backbone]
    fitting = f" Heads for {held}: {', '.join(others)}." if others else ""
    if held == spec.backbone:  # but of other data: the error says which
        return f"the head {file.source} and the backbone {name} do not fit: {needs}. {error}"
    return f"the head {file.source} and the backbone {name} do not fit: {needs}, and that is {held}.{fitting}"


def _what(weights: Any) -> str | None:
    from densedino.weights.files import read_checkpoint
    from densedino.weights.head_files import describe

    if isinstance(weights, Mapping):
        return describe(weights)
    path = Path(str(weights)).expanduser()
    return describe(read_checkpoint(path, thorough=False).state) if path.exists() else None
