"""Owns what a head is to tell: classes of pixels, depth, or the class of an image; its loss, its score, its answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from densedino.adapters.heads import Purpose
from densedino.errors import InputError, UnknownNameError
from densedino.features.probes import confusion_matrix, mean_iou
from densedino.features.tokens import upsample_tokens
from densedino.heads.bins import Bins, depth_of

if TYPE_CHECKING:
    from densedino.images.transforms import Geometry

__all__ = ["NOT_COUNTED", "Kind", "Meter", "Prediction", "Task", "at_pixels", "task_loss"]

Kind = Literal["segmentation", "depth", "classification"]
NOT_COUNTED = -100
"""The class of a target that no loss counts; PyTorch's own number for it."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is to be told, and in which terms."""

    kind: Kind
    classes: tuple[str, ...] = ()
    """Names by number; the numbers themselves where nobody named them."""
    ignore: int = 255
    """The label of a mask's pixels that are of no class."""
    depth_unit: float = 1.0
    """Metres that a depth map's number 1 means."""
    most_depth: float = 10.0
    """Metres; depths beyond are not learnt."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise UnknownNameError("task", self.kind, get_args(Kind))
        if self.depth_unit <= 0 or self.most_depth <= 0.001:
            raise InputError(
                f"depth_unit {self.depth_unit} and most_depth {self.most_depth} must be above 0, in metres."
            )

    @property
    def bins(self) -> Bins:
        """Of depth: 256 from 1 mm on, as DINOv2 and DINOv3 have it."""
        return Bins(most=self.most_depth)

    @property
    def purpose(self) -> Purpose:
        """For `build_head`."""
        depth = self.kind == "depth"
        return Purpose(out=self.bins.number if depth else len(self.classes), whole=self.kind == "classification")

    @property
    def metric(self) -> str:
        """The name of the score."""
        return {"segmentation": "mIoU", "depth": "RMSE", "classification": "top-1"}[self.kind]

    @property
    def higher_is_better(self) -> bool:
        """Of the score."""
        return self.kind != "depth"


def task_loss(task: Task, logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over what is counted: cross-entropy of classes, or SILog of depths (Eigen et al. 2014, λ = 0.85).

    Args:
        task: which of them.
        logits: [B, K, h, w] of a head, interpolated to the targets' size; [B, K, 1, 1] for whole images.
        targets: int64 [B, H, W] classes or `NOT_COUNTED`; float [B, H, W] metres, not finite where unknown; int64 [B].
    """
    if task.kind == "classification":
        return F.cross_entropy(logits[:, :, 0, 0], targets)
    if task.kind == "segmentation":
        logits = _resized(logits, targets)
        counted = (targets != NOT_COUNTED).sum().clamp(min=1)  # a batch without a label gives 0, not NaN
        return F.cross_entropy(logits, targets, ignore_index=NOT_COUNTED, reduction="sum") / counted
    depth = _resized(depth_of(logits, task.bins), targets)[:, 0]
    known = _known(targets, task)
    logs = torch.where(known, depth.clamp(min=1e-3).log() - targets.where(known, torch.ones_like(targets)).log(), 0.0)
    count = known.sum().clamp(min=1)
    mean, square = logs.sum() / count, logs.square().sum() / count
    return (square - 0.85 * mean.square()).clamp(min=1e-8).sqrt()


def _resized(maps: Tensor, targets: Tensor) -> Tensor:
    if maps.shape[2:] == targets.shape[1:]:
        return maps
    return F.interpolate(maps, size=targets.shape[1:], mode="bilinear")


def _known(depth: Tensor, task: Task) -> Tensor:
    return depth.isfinite() & (depth > 0) & (depth <= task.most_depth)


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a head tells of one image."""

    kind: Kind
    labels: Tensor | None = None
    """Segmentation: int64 [H, W], the class of each pixel of the image as it was decoded."""
    depth: Tensor | None = None
    """Depth: float32 [H, W], metres."""
    label: int | None = None
    """Classification: the class."""
    probabilities: Tensor | None = None
    """Classification: [C]."""
    classes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Classification: the class by name."""
        return self.classes[self.label] if self.label is not None else ""


def at_pixels(maps: Tensor, geometry: Geometry, source: tuple[int, int], *, stride: int) -> Tensor:
    """Maps [1, K, h, w] of a padded input as maps [K, H, W] of the picture's own pixels, bilinear, half-pixel exact.

    Args:
        maps: over the whole grid of patches, padding included.
        geometry: what became of the picture's size.
        source: (H, W) of the picture.
        stride: pixels per patch.
    """
    pitch = [side * stride / count for side, count in zip(geometry.grid, maps.shape[2:], strict=True)]
    extent = (geometry.resized[0] / pitch[0], geometry.resized[1] / pitch[1])
    return upsample_tokens(maps.permute(0, 2, 3, 1), source, extent=extent, stride=1)[0]


def answer(task: Task, logits: Tensor, geometry: Geometry, source: tuple[int, int], *, stride: int) -> Prediction:
    """The prediction that logits [1, K, h, w] of one image are."""
    if task.kind == "classification":
        shares = logits[0, :, 0, 0].softmax(0)
        return Prediction(kind=task.kind, label=int(shares.argmax()), probabilities=shares, classes=task.classes)
    if task.kind == "depth":
        depth = at_pixels(depth_of(logits, task.bins), geometry, source, stride=stride)[0]
        return Prediction(kind=task.kind, depth=depth)
    labels = at_pixels(logits, geometry, source, stride=stride).argmax(0)
    return Prediction(kind=task.kind, labels=labels, classes=task.classes)


class Meter:
    """Gathers a score over images: mean IoU or right classes in percent, or RMSE in metres."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.confusion = torch.zeros(len(task.classes), len(task.classes), dtype=torch.int64)
        self.total = torch.zeros((), dtype=torch.float64)
        self.count = 0

    def add(self, prediction: Prediction, true: Tensor | int) -> None:
        """One image with its labels: classes [H, W] as the mask has them, metres [H, W], or a class."""
        if prediction.labels is not None and isinstance(true, Tensor):
            self.confusion += confusion_matrix(
                prediction.labels.cpu(), true, num_classes=len(self.task.classes), ignore=self.task.ignore
            )
        elif prediction.depth is not None and isinstance(true, Tensor):
            known = _known(true, self.task)
            self.total += (prediction.depth.cpu() - true)[known].double().square().sum()
            self.count += int(known.sum())
        else:
            self.total += float(prediction.label == true)
            self.count += 1

    @property
    def score(self) -> float:
        """NaN if nothing was counted."""
        if self.task.kind == "segmentation":
            return 100 * mean_iou(self.confusion)
        mean = float(self.total) / self.count if self.count else float("nan")
        return mean**0.5 if self.task.kind == "depth" else 100 * mean
