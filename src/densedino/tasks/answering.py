"""Owns what is kept of each kind of answer: for one picture its record and images, for all of them one table."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from densedino import __version__
from densedino.tasks import drawing
from densedino.tasks.folder import Answer

if TYPE_CHECKING:
    from collections.abc import Mapping

    from densedino.images.decoding import Pixels
    from densedino.tasks.boxes import ObjectDetector
    from densedino.tasks.classes import Classes, Classifier
    from densedino.tasks.depth import DepthEstimator
    from densedino.tasks.loading import HeadModel
    from densedino.tasks.masks import ClassMap, SemanticSegmentor
    from densedino.tasks.texts import TextReader

__all__ = [
    "Answerer",
    "classes_csv",
    "classifying",
    "coco_json",
    "detecting",
    "estimating",
    "heading_of",
    "reading",
    "segmenting",
]

Answerer = Callable[["Pixels"], Answer]


def heading_of(model: HeadModel) -> tuple[str, str]:
    """(what stands on top of sheets, what must not be overlooked)."""
    alarm = "UNTRAINED: random weights, the answer is noise" if model.headed.untrained else ""
    return f"densedino {__version__} · {model.headed.spec.name} on {model.headed.card.name}", alarm


def classifying(model: Classifier, *, top: int) -> Answerer:
    """Names and probabilities of the `top` classes."""
    return lambda pixels: Answer({"classes": _listed(model(pixels)[0], top)})


def _listed(classes: Classes, top: int) -> list[dict[str, Any]]:
    return [{"name": name, "probability": round(p, 6)} for name, p in classes.top(top)]


def estimating(model: DepthEstimator, *, flip: bool) -> Answerer:
    """A 16-bit image, a sheet, and the least and most metres."""
    heading, alarm = heading_of(model)
    title = "height above ground, metres" if model.is_height else "depth, metres"

    def answer(pixels: Pixels) -> Answer:
        (depth,) = model(pixels, flip=flip)
        images = {
            "depth": drawing.depth_image(depth),
            "sheet": drawing.depth_sheet(depth, pixels, title=title, heading=heading, alarm=alarm),
        }
        least, most = float(depth.metres.min()), float(depth.metres.max())
        return Answer({"metres": [least, most], "levels_per_metre": drawing.PER_METRE}, images)

    return answer


def segmenting(model: SemanticSegmentor, *, augment: bool) -> Answerer:
    """A PNG of class numbers, a sheet, and the share of each class."""
    heading, alarm = heading_of(model)

    def answer(pixels: Pixels) -> Answer:
        return _mapped(model(pixels, augment=augment)[0], pixels, heading, alarm)

    return answer


def _mapped(found: ClassMap, pixels: Pixels, heading: str, alarm: str) -> Answer:
    labels = found.classes.numpy()
    counts = np.bincount(labels.ravel(), minlength=len(found.names))
    shares = {found.names[i]: round(float(counts[i] / counts.sum()), 6) for i in np.argsort(-counts) if counts[i]}
    images = {
        "classes": drawing.label_image(labels, found.names),
        "sheet": drawing.classes_sheet(found, pixels, heading=heading, alarm=alarm),
    }
    return Answer({"shares": shares, "confidence": round(float(found.confidence.mean()), 6)}, images)


def detecting(model: ObjectDetector, *, threshold: float) -> Answerer:
    """Boxes as COCO has them, and a sheet."""
    heading, alarm = heading_of(model)

    def answer(pixels: Pixels) -> Answer:
        (found,) = model(pixels, threshold=threshold)
        objects = [
            {
                "category_id": int(label),
                "name": found.names[int(label)],
                "bbox": [round(v, 2) for v in (x1, y1, x2 - x1, y2 - y1)],
                "score": round(float(score), 6),
            }
            for (x1, y1, x2, y2), label, score in zip(found.boxes.tolist(), found.labels, found.scores, strict=True)
        ]
        height, width = pixels.array.shape[:2]
        sheet = drawing.boxes_sheet(found, pixels, heading=heading, alarm=alarm)
        return Answer({"height": height, "width": width, "objects": objects}, {"sheet": sheet})

    return answer


def reading(model: TextReader, labels: Sequence[str], *, prompts: str, maps: bool) -> Answerer:
    """Probabilities of the labels; with `maps` a PNG of the label of each pixel too, and a sheet."""
    heading, alarm = heading_of(model)

    def answer(pixels: Pixels) -> Answer:
        (classes,) = model(pixels, labels, prompts=prompts)
        record = {"classes": _listed(classes, len(labels))}
        if not maps:
            return Answer(record)
        mapped = _mapped(model.segment(pixels, labels, prompts=prompts)[0], pixels, heading, alarm)
        return Answer({**record, **mapped.record}, mapped.images)

    return answer


def classes_csv(records: Sequence[Mapping[str, Any]]) -> str:
    """One line per picture and class, the most probable first."""
    out = io.StringIO()
    table = csv.writer(out, lineterminator="\n")
    table.writerow(["image", "rank", "class", "probability"])
    for record in records:
        for rank, one in enumerate(record["classes"], 1):
            table.writerow([record["image"], rank, one["name"], one["probability"]])
    return out.getvalue()


def coco_json(records: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    """Images, annotations (with scores) and categories, as COCO has them."""
    images = [
        {"id": i, "file_name": record["image"], "height": record["height"], "width": record["width"]}
        for i, record in enumerate(records, 1)
    ]
    annotations: list[dict[str, Any]] = []
    for i, record in enumerate(records, 1):
        for one in record["objects"]:
            width, height = one["bbox"][2:]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": i,
                    "category_id": one["category_id"],
                    "bbox": one["bbox"],
                    "area": round(width * height, 2),
                    "score": one["score"],
                    "iscrowd": 0,
                }
            )
    categories = [{"id": i, "name": name} for i, name in enumerate(names) if name]
    return json.dumps({"images": images, "annotations": annotations, "categories": categories})
