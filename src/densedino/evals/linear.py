"""Owns the linear classification protocol: SGD on CLS and mean patch, the learning rate chosen on a held-out part."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from densedino.evals.knn import labels_of
from densedino.evals.labelled import find_labelled
from densedino.evals.protocol import Protocol, Scores, Task

if TYPE_CHECKING:
    from torch import Tensor

    from densedino.evals.metrics import Sums

__all__ = ["PROTOCOL", "Settings", "count_correct", "held_out", "top1"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """DINOv2's probe (arXiv 2304.07193, appendix B.3) on stored features, so without changing images."""

    steps: int = 2000
    batch: int = 128
    rates: tuple[float, ...] = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
    """Learning rates, each times batch / 256; the best on the held-out part is taken, never by the test images."""
    momentum: float = 0.9
    held_out: float = 0.1
    """Part of the training images, that chooses; then all are trained on."""


def held_out(labels: Tensor, share: float, *, seed: int) -> tuple[Tensor, Tensor]:
    """Places to learn from, and to choose by: `share` of every class, one at least, of classes that have two."""
    generator = torch.Generator().manual_seed(seed + 7919)
    chosen: list[int] = []
    for label in labels.unique():
        places = (labels == label).nonzero()[:, 0]
        order = places[torch.randperm(len(places), generator=generator)]
        chosen += order[: min(max(1, round(share * len(places))), len(places) - 1)].tolist()
    mask = torch.zeros(len(labels), dtype=torch.bool)
    mask[chosen] = True
    return (~mask).nonzero()[:, 0], mask.nonzero()[:, 0]


def count_correct(predicted: Tensor, true: Tensor, task: Task) -> Scores:
    """Scores of predicted classes [n]."""
    return Scores(
        keys=tuple(sample.key for sample in task.data.test),
        counts={
            "correct": (predicted == true).numpy().astype(np.int64),
            "images": np.ones(len(true), np.int64),
        },
    )


def top1(sums: Sums, settings: object) -> dict[str, float]:
    """Top-1 in percent."""
    return {"top1": 100 * float(sums["correct"]) / float(sums["images"])}


def _fit(x: Tensor, y: Tensor, *, rates: Tensor, classes: int, settings: Settings, seed: int) -> tuple[Tensor, Tensor]:
    """Heads for all rates at once: weights [R, D, C], biases [R, 1, C]."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(len(rates), x.shape[1], classes, generator=generator) * 0.01
    bias = torch.zeros(len(rates), 1, classes)
    speed_w, speed_b = torch.zeros_like(weight), torch.zeros_like(bias)
    for step in range(settings.steps):
        pick = torch.randint(len(x), (settings.batch,), generator=generator)
        part, wanted = x[pick], y[pick]
        error = (part @ weight + bias).softmax(-1) - F.one_hot(wanted, classes)
        rate = (rates * 0.5 * (1 + math.cos(math.pi * step / settings.steps)))[:, None, None]
        speed_w = settings.momentum * speed_w + part.T @ error / settings.batch
        speed_b = settings.momentum * speed_b + error.mean(1, keepdim=True)
        weight, bias = weight - rate * speed_w, bias - rate * speed_b
    return weight, bias


def evaluate(head: str, task: Task) -> Scores:
    """Whether each test image is classified rightly."""
    settings: Settings = task.settings
    train, test = labels_of(task)
    x, queries = (
        torch.cat([task.stored.vectors(part), task.stored.means(part)], 1) for part in (task.train, task.data.test)
    )
    classes = len(task.data.classes)
    rates = torch.tensor(settings.rates) * settings.batch / 256
    learn, choose = held_out(train, settings.held_out, seed=task.seed)
    best = 0
    if len(choose):
        weight, bias = _fit(x[learn], train[learn], rates=rates, classes=classes, settings=settings, seed=task.seed)
        losses = [F.cross_entropy(x[choose] @ w + b, train[choose]) for w, b in zip(weight, bias, strict=True)]
        best = int(torch.stack(losses).nan_to_num(torch.inf).argmin())
    weight, bias = _fit(x, train, rates=rates[best : best + 1], classes=classes, settings=settings, seed=task.seed)
    return count_correct((queries @ weight[0] + bias[0]).argmax(1), test, task)


PROTOCOL = Protocol(
    name="linear",
    find=find_labelled,
    settings=Settings,
    heads=lambda settings: ("linear",),
    evaluate=evaluate,
    figures=top1,
    rule="CLS and the mean of patches, both after the final norm, side by side.",
    resize=224,
    random_heads=frozenset({"linear"}),
)
