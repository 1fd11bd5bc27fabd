"""Owns the segmentation protocol: a linear and a k-NN probe of patches; mean IoU and boundary F at original size."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from densedino.errors import InputError
from densedino.evals.boundary import boundary_f_of, boundary_tolerance, count_boundaries
from densedino.evals.datasets import read_labels
from densedino.evals.maps import find_masks
from densedino.evals.metrics import count_classes, iou_of
from densedino.evals.pixel_probe import Fitting, PixelProbe, fit_probe
from densedino.evals.protocol import Protocol, Scores, Task, gather
from densedino.evals.unet import Training, fit_unet, unet_labels

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray
    from torch import Tensor

    from densedino.evals.datasets import Dataset, Sample
    from densedino.evals.metrics import Counts, Sums
    from densedino.evals.tokens import TokenMap

__all__ = ["PROTOCOL", "Settings", "count_maps", "training_labels"]

_ROWS = 64
"""Of pixels that are predicted at once: 150 classes of a large image would not fit into memory."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The linear probe of DINOv2 and v3, solved to the end, and the k-NN of Balažević et al. (arXiv 2306.01667)."""

    heads: tuple[str, ...] = ("linear", "k-NN")
    """Of these."""
    fitting: Fitting = field(default_factory=Fitting)
    neighbours: int = 30
    temperature: float = 0.02
    memory: int = 20_000
    """Patches of training images that k-NN remembers, drawn by the seed."""
    tolerance: float = 0.0075
    """Of boundaries, as a part of the image's diagonal."""
    unet: Training = field(default_factory=Training)


def count_maps(predicted: NDArray[np.integer], true: NDArray[np.integer], *, data: Dataset, tolerance: float) -> Counts:
    """All sums of one image: classes and boundaries."""
    radius = boundary_tolerance(true.shape, share=tolerance)
    classes = len(data.classes)
    counts = count_classes(predicted, true, num_classes=classes, ignore=data.ignore)
    return counts | count_boundaries(predicted, true, num_classes=classes, ignore=data.ignore, tolerance=radius)


def training_labels(task: Task) -> Callable[[int], Tensor]:
    """The labels of training image i [H, W] int64, checked; kept in memory as bytes where they fit.

    Raises:
        ImageError: a mask that cannot be used; the message names it.
        InputError: all of them together have one class only.
    """
    kept: dict[int, Tensor] = {}
    seen: set[int] = set()
    for i, sample in enumerate(task.train):
        labels = read_labels(sample, task.data, size=_size(task, sample))
        seen |= set(np.unique(labels).tolist()) - {task.data.ignore}
        if i < 4096:
            kept[i] = torch.from_numpy(labels.astype(np.uint8 if len(task.data.classes) < 255 else np.int32))
    if len(seen) < 2:
        names = ", ".join(task.data.classes[label] for label in seen) or "none"
        raise InputError(
            f"the {len(task.train)} training masks of {str(task.data.root)!r} have one class only ({names}); the first "
            f"is {str(task.train[0].target)!r}. There is nothing to tell apart."
        )

    def labels_of(i: int) -> Tensor:
        if i in kept:
            return kept[i].long()
        return torch.from_numpy(read_labels(task.train[i], task.data).astype(np.int64))

    return labels_of


def _size(task: Task, sample: Sample) -> tuple[int, int] | None:
    return task.tokens.map(sample).source_size if task.tokens else None


def evaluate(head: str, task: Task) -> Scores:
    """Judge every test image at the size of its mask."""
    labels_of = training_labels(task)
    probe = _linear(task, labels_of) if head == "linear" else None
    predict = _neighbours(task, labels_of) if probe is None else functools.partial(_best, probe)
    counts = []
    for sample in task.data.test:
        tokens = task.stored.map(sample, keep=False)
        true = read_labels(sample, task.data, size=tokens.source_size)
        counts.append(count_maps(predict(tokens), true, data=task.data, tolerance=task.settings.tolerance))
    return gather([sample.key for sample in task.data.test], counts, head=probe.arrays() if probe else None)


def _linear(task: Task, labels_of: Callable[[int], Tensor]) -> PixelProbe:
    void = -100 if task.data.ignore is None else task.data.ignore
    return fit_probe(
        lambda i: task.stored.map(task.train[i]),
        labels_of,
        count=len(task.train),
        outputs=len(task.data.classes),
        loss=lambda found, wanted: F.cross_entropy(found, wanted, ignore_index=void),
        fitting=task.settings.fitting,
        seed=task.seed,
    )


def _best(probe: PixelProbe, tokens: TokenMap) -> NDArray[np.int64]:
    """The class of each pixel [H, W]."""
    height = tokens.source_size[0]
    parts = [probe(tokens, rows=slice(top, top + _ROWS)).argmax(-1) for top in range(0, height, _ROWS)]
    found: NDArray[np.int64] = torch.cat(parts).numpy()
    return found


def _neighbours(task: Task, labels_of: Callable[[int], Tensor]) -> Callable[[TokenMap], NDArray[np.int64]]:
    """Patches vote with the shares of classes in their pixels; votes are interpolated to pixels as logits are."""
    settings: Settings = task.settings
    generator = torch.Generator().manual_seed(task.seed)
    each = max(1, settings.memory // len(task.train))
    bank, shares = [], []
    for i, sample in enumerate(task.train):
        tokens = task.stored.map(sample)
        share = _shares(labels_of(i), tokens, num_classes=len(task.data.classes))
        known = share.sum(1).nonzero()[:, 0]
        picked = known[torch.randperm(len(known), generator=generator)[:each]]
        bank.append(F.normalize(tokens.float().flatten(0, 1)[picked], dim=1))
        shares.append(share[picked])
    memory, votes = torch.cat(bank), torch.cat(shares)

    def predict(tokens: TokenMap) -> NDArray[np.int64]:
        queries = F.normalize(tokens.float().flatten(0, 1), dim=1)
        voted = []
        for part in queries.split(256):
            cosines, places = (part @ memory.T).topk(min(settings.neighbours, len(memory)))
            weights = (cosines / settings.temperature).softmax(1)
            voted.append(torch.einsum("nk,nkc->nc", weights, votes[places]))
        grid = torch.cat(voted).view(*tokens.array.shape[:2], -1)
        return _best(_Fixed(grid), tokens)

    return predict


class _Fixed(PixelProbe):
    """Outputs that are there already."""

    def __init__(self, grid: Tensor) -> None:
        self._grid = grid

    def grid(self, tokens: TokenMap) -> Tensor:
        return self._grid


def _shares(labels: Tensor, tokens: TokenMap, *, num_classes: int) -> Tensor:
    """The share of each class among the pixels whose centre falls on each patch: [h * w, C]; 0 where all is void."""
    (h, w), (height, width) = tokens.array.shape[:2], tokens.source_size
    y, x = torch.arange(height, dtype=torch.float64), torch.arange(width, dtype=torch.float64)
    rows = ((y + 0.5) * tokens.input_size[0] / height / tokens.stride).floor().long().clamp(max=h - 1)
    cols = ((x + 0.5) * tokens.input_size[1] / width / tokens.stride).floor().long().clamp(max=w - 1)
    known = (labels >= 0) & (labels < num_classes)
    places = ((rows[:, None] * w + cols) * num_classes + labels)[known]
    counts = torch.bincount(places, minlength=h * w * num_classes).view(h * w, num_classes).float()
    return counts / counts.sum(1, keepdim=True).clamp(min=1)


def figures(sums: Sums, settings: Settings) -> dict[str, float]:
    """Mean IoU, boundary F, accuracies."""
    return iou_of(sums) | boundary_f_of(sums)


def evaluate_unet(task: Task) -> Scores:
    """A U-Net trained end to end on the same images and labels."""
    net = fit_unet(task, training_labels(task), training=task.settings.unet)
    counts = []
    for sample in task.data.test:
        true = read_labels(sample, task.data)
        predicted = unet_labels(net, sample, training=task.settings.unet)
        if predicted.shape != true.shape:
            true = read_labels(sample, task.data, size=(predicted.shape[0], predicted.shape[1]))
        counts.append(count_maps(predicted, true, data=task.data, tolerance=task.settings.tolerance))
    return gather([sample.key for sample in task.data.test], counts)


PROTOCOL = Protocol(
    name="segmentation",
    find=find_masks,
    settings=Settings,
    heads=lambda settings: settings.heads,
    evaluate=evaluate,
    figures=figures,
    rule=(
        "Patches after the final norm; logits (or votes) are interpolated bilinearly from patch centres to pixels of "
        "the original mask; void pixels count nowhere. Boundary F: per class, within 0.75 % of the diagonal."
    ),
    random_heads=frozenset({"linear", "k-NN"}),
    supervised={"unet": evaluate_unet},
)
