"""Owns the k-NN protocol: classes of images by a weighted vote of the nearest CLS tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from densedino.errors import InputError
from densedino.evals.labelled import find_labelled
from densedino.evals.protocol import Protocol, Scores, Task

if TYPE_CHECKING:
    from torch import Tensor

    from densedino.evals.metrics import Sums

__all__ = ["PROTOCOL", "Settings", "labels_of", "vote"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """DINO's protocol (arXiv 2104.14294, appendix)."""

    k: tuple[int, ...] = (20, 10, 100, 200)
    """Neighbours; the first one is the headline."""
    temperature: float = 0.07


def vote(
    queries: Tensor, bank: Tensor, labels: Tensor, *, num_classes: int, k: tuple[int, ...], temperature: float
) -> Tensor:
    """Class of each query for each k: int64 [len(k), n].

    A neighbour votes for its class with exp(cosine / temperature). At most as many vote as there are. Of equal votes
    the class of the nearest neighbour among them wins. Computed in float64, so that ties are ties.

    Args:
        queries: [n, D].
        bank: [m, D].
        labels: [m] int64.
        num_classes: C.
        k: numbers of neighbours.
        temperature: of the votes.
    """
    bank = F.normalize(bank.double(), dim=-1)
    winners: list[list[Tensor]] = [[] for _ in k]
    for part in F.normalize(queries.double(), dim=-1).split(512):
        cosines, places = (part @ bank.T).topk(min(max(k), len(bank)))
        weights, voted = ((cosines - 1) / temperature).exp(), labels[places]
        for i, count in enumerate(k):
            votes = weights.new_zeros(len(part), num_classes).scatter_add_(1, voted[:, :count], weights[:, :count])
            best = votes.amax(1, keepdim=True)
            tied = votes.gather(1, voted[:, :count]) >= best * (1 - 1e-12)
            winners[i].append(voted.gather(1, tied.int().argmax(1, keepdim=True))[:, 0])
    return torch.stack([torch.cat(one) for one in winners])


def labels_of(task: Task) -> tuple[Tensor, Tensor]:
    """Classes of the samples to learn from and of those to judge on: int64 [m], [n].

    Raises:
        InputError: all samples to learn from are of one class.
    """
    train, test = (torch.tensor([sample.label for sample in part]) for part in (task.train, task.data.test))
    if len(train.unique()) < 2:
        raise InputError(f"all {len(train)} training images of {str(task.data.root)!r} are of one class.")
    return train, test


def evaluate(head: str, task: Task) -> Scores:
    """Whether each test image is classified rightly, for each k."""
    settings: Settings = task.settings
    train, test = labels_of(task)
    found = vote(
        task.stored.vectors(task.data.test),
        task.stored.vectors(task.train),
        train,
        num_classes=len(task.data.classes),
        k=settings.k,
        temperature=settings.temperature,
    )
    return Scores(
        keys=tuple(sample.key for sample in task.data.test),
        counts={"correct": (found == test).T.numpy().astype(np.int64), "images": np.ones(len(test), np.int64)},
    )


def figures(sums: Sums, settings: Settings) -> dict[str, float]:
    """Top-1 in percent for each k."""
    return {
        f"top1@{k}": 100 * float(correct) / float(sums["images"])
        for k, correct in zip(settings.k, sums["correct"], strict=True)
    }


PROTOCOL = Protocol(
    name="knn",
    find=find_labelled,
    settings=Settings,
    heads=lambda settings: ("k-NN",),
    evaluate=evaluate,
    figures=figures,
    rule="CLS after the final norm, L2-normalised; neighbours vote with exp(cosine / temperature).",
    resize=224,
)
