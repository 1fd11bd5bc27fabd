"""Owns the layer sweep: how much a linear map of each block's tokens tells of a task, in closed or convex form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from densedino.adapters.batches import StoredTokens
from densedino.adapters.labels import read_truth
from densedino.adapters.tasks import NOT_COUNTED, Meter, Prediction, at_pixels
from densedino.errors import InputError
from densedino.features.extract import extract
from densedino.features.probes import fit_linear_probe
from densedino.features.store import FeatureStore
from densedino.images.labelled import evenly

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from torch import Tensor

    from densedino.adapters.labels import Example, Labelled
    from densedino.adapters.tasks import Task
    from densedino.features.extractor import FeatureExtractor
    from densedino.features.probes import LinearProbe

__all__ = ["Block", "sweep"]


@dataclass(frozen=True)
class Block:
    """What a linear map of one block's tokens, after the final norm, tells."""

    layer: int
    score: float


def sweep(
    dino: FeatureExtractor,
    labelled: Labelled,
    store: Path,
    *,
    limit: int = 100,
    advance: Callable[[Block], None] = lambda block: None,
) -> list[Block]:
    """Score every block of a backbone, each with the best linear map from its tokens to the training labels.

    Classes by multinomial logistic regression (`features.probes.fit_linear_probe`: no seed, no learning rate), depth by
    ridge regression of its logarithm. Pixels get interpolated scores.

    Args:
        dino: of `dd.load`.
        labelled: of `read_labelled`.
        store: where features of all blocks are kept.
        limit: images of each split, spread evenly.
        advance: called with each block.

    Raises:
        InputError: images that cannot be read; the message names one.
    """
    train = [labelled.train[i] for i in evenly(len(labelled.train), limit)]
    val = [labelled.val[i] for i in evenly(len(labelled.val), limit)]
    depth = dino.model.depth
    report = extract(dino, [e.image for e in (*train, *val)], output=store, layers=range(depth - 1))
    if report.quarantined:
        raise InputError(f"{report.quarantined[0].key}: {report.quarantined[0].reason}")
    opened, blocks = FeatureStore(store), []
    for layer in range(depth):
        tokens = StoredTokens(opened, labelled.task, (layer,), depth=depth)
        probe = _fitted(tokens, labelled.task, train)
        meter = Meter(labelled.task)
        for example in val:
            meter.add(_told(tokens, labelled.task, probe, example), read_truth(labelled.task, example))
        blocks.append(Block(layer, meter.score))
        advance(blocks[-1])
    return blocks


def _fitted(tokens: StoredTokens, task: Task, train: Sequence[Example]) -> LinearProbe:
    features, targets = [], []
    for step, example in enumerate(train):
        taps, target = tokens.batch([example], seed=0, step=step)
        if task.kind == "classification":
            features.append(_whole(taps[0].cls, taps[0].patches))
            targets.append(torch.nn.functional.one_hot(target, len(task.classes)).float())
            continue
        patches = taps[0].patches[0]
        cells = target.shape[1] // patches.shape[0]
        per_patch = target[0].unfold(0, cells, cells).unfold(1, cells, cells).flatten(2).flatten(0, 1)
        features.append(patches.flatten(0, 1))
        targets.append(_shares(per_patch, task) if task.kind == "segmentation" else _logs(per_patch, task))
    x, y = torch.cat(features), torch.cat(targets)
    return fit_linear_probe(x, y)[0] if task.kind != "depth" else _ridge(x, y)


def _whole(cls: Tensor, patches: Tensor) -> Tensor:
    return torch.cat([cls, patches.mean(dim=(1, 2))], dim=-1)


def _shares(labels: Tensor, task: Task) -> Tensor:
    """[n, cells] classes to the share of each [n, C]; all 0 where none is counted."""
    counted = labels != NOT_COUNTED
    hot = torch.nn.functional.one_hot(labels.clamp(min=0), len(task.classes)).float() * counted[..., None]
    return hot.sum(1) / counted.sum(1, keepdim=True).clamp(min=1)


def _logs(depths: Tensor, task: Task) -> Tensor:
    """[n, cells] metres to the mean logarithm [n, 1]; NaN where none is known."""
    known = depths.isfinite() & (depths > 0) & (depths <= task.most_depth)
    return torch.where(known, depths, torch.nan).log().nanmean(1, keepdim=True)


def _ridge(x: Tensor, y: Tensor, *, penalty: float = 1e-3) -> LinearProbe:
    from densedino.features.probes import LinearProbe

    known = y[:, 0].isfinite()
    x, y = x[known].double(), y[known].double()
    mean, std = x.mean(0), x.std(0, correction=0).clamp(min=1e-6)
    z, centre = (x - mean) / std, y.mean(0)
    gram = z.T @ z / len(z) + penalty * torch.eye(z.shape[1], dtype=z.dtype)
    weight = torch.linalg.solve(gram, z.T @ (y - centre) / len(z)) / std[:, None]
    return LinearProbe(weight.float(), (centre - mean @ weight).float())


def _told(tokens: StoredTokens, task: Task, probe: LinearProbe, example: Example) -> Prediction:
    taps, geometry, source = tokens.taps(example)
    tap = taps[0]
    if task.kind == "classification":
        scores = _whole(tap.cls, tap.patches) @ probe.weight + probe.bias
        return Prediction(kind=task.kind, label=int(scores.argmax()))
    scores = (tap.patches @ probe.weight + probe.bias).permute(0, 3, 1, 2)
    maps = at_pixels(scores, geometry, source, stride=tokens.store.transform.stride)
    if task.kind == "depth":
        return Prediction(kind=task.kind, depth=maps[0].exp())
    return Prediction(kind=task.kind, labels=maps.argmax(0))
