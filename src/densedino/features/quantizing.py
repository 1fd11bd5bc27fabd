"""Owns `quantize`: from weights and images to a file in integers with a fidelity report in it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from densedino.engines.quantized import Quantized, calibrate, check_target, quantized_engine, write_quantized
from densedino.errors import InputError
from densedino.features.extractor import FeatureExtractor, load
from densedino.features.fidelity import VOID, Fidelity, compare, set_apart
from densedino.images.datasets import list_inputs

if TYPE_CHECKING:
    import os

    from densedino.weights.loading import Weights

__all__ = ["Quantization", "quantize"]


@dataclass(frozen=True)
class Quantization:
    """What `quantize` did."""

    original: FeatureExtractor
    quantized: FeatureExtractor
    fidelity: Fidelity
    calibrated: int
    """Images."""


def quantize(
    name: str | None = None,
    *,
    weights: Weights = None,
    images: str | os.PathLike[str],
    output: str | os.PathLike[str],
    to: Literal["int8", "int4"] = "int8",
    size: int = 224,
    most: int = 128,
    labelled: str | os.PathLike[str] | None = None,
    masks: str | os.PathLike[str] | None = None,
    void: int = VOID,
) -> Quantization:
    """Write a backbone in integers, as a file that `dd.load(weights=…)` takes; it says how near it is.

    Args:
        name: of weights or an architecture, as in `dd.load`.
        weights: as in `dd.load`.
        images: a folder, a pattern, a list or one file: pictures like those that will come.
        output: a .safetensors file that does not exist yet.
        to: int8 or int4.
        size: short side in pixels.
        most: images to calibrate on; the report is on up to 32 others, or on these if there are none.
        labelled: a folder with a folder of images for each class.
        masks: a folder of images with a map of labels each, as in `compare`.
        void: the label in masks that is not counted.

    Raises:
        InputError: fewer than 8 images, or an output that cannot be written.
        MissingExtraError: OpenVINO or NNCF is not installed.
    """
    target = check_target(output)
    paths = [item.path for item in list_inputs([images]).items if not item.is_video]
    if not paths:
        raise InputError(f"no images in {images}; give a folder of pictures like those that will come.")
    seen, judged = set_apart(paths, most=most)
    original = load(name, weights=weights, device="cpu", engine="eager", precision="fp32", resize=size)
    batches = [original.transform(path).pixels[None] for path in seen]
    graph = calibrate(original.model, batches, to=to)
    draft = Quantized(graph, original.model, original.card, to, {})
    engine = quantized_engine(draft)
    draft_extractor = FeatureExtractor(engine, original.transform, original.card)
    fidelity = compare(original, draft_extractor, judged, labelled=labelled, masks=masks, void=void)
    fidelity = replace(fidelity, bytes_b=draft.nbytes)
    write_quantized(
        graph, target, card=original.card, precision=to, report=fidelity.to_json(), spec=original.model.spec
    )
    quantized = load(weights=target, resize=size)
    return Quantization(original, quantized, fidelity, len(seen))
