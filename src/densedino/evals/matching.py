"""Owns dense matching: where points of one image are in another one, by the nearest patch; PCK."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from densedino.evals.metrics import count_points, pck_of
from densedino.evals.protocol import Scores, Task, gather

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from densedino.evals.metrics import Sums
    from densedino.evals.tokens import TokenMap

__all__ = ["match_points", "pck_figures", "score_pairs"]


def match_points(source: TokenMap, target: TokenMap, points: NDArray[np.floating]) -> NDArray[np.float64]:
    """Where points (x, y) of the source file are in the target file: [n, 2], in pixels.

    The source's feature is interpolated bilinearly at the point (beyond the outermost patch centres the nearest one
    holds); the answer is the centre of the patch with the largest cosine, the first of equal ones.
    """
    places = torch.from_numpy(source.to_tokens(points)).float()
    queries = F.normalize(_sample(source.float(), places), dim=1)
    patches = F.normalize(target.float().flatten(0, 1), dim=1)
    best = torch.cat([(part @ patches.T).argmax(1) for part in queries.split(1024)])
    width = target.array.shape[1]
    return target.to_pixels(torch.stack([best % width, best // width], 1).numpy())


def _sample(patches: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Bilinear values of [h, w, D] at places (x, y) [n, 2] of the grid: [n, D]."""
    h, w, _ = patches.shape
    x, y = places[:, 0].clamp(0, w - 1), places[:, 1].clamp(0, h - 1)
    left, top = x.floor().long().clamp(max=max(w - 2, 0)), y.floor().long().clamp(max=max(h - 2, 0))
    right, below = (left + 1).clamp(max=w - 1), (top + 1).clamp(max=h - 1)
    fx, fy = (x - left)[:, None], (y - top)[:, None]
    upper = patches[top, left] * (1 - fx) + patches[top, right] * fx
    lower = patches[below, left] * (1 - fx) + patches[below, right] * fx
    return upper * (1 - fy) + lower * fy


def score_pairs(head: str, task: Task) -> Scores:
    """PCK sums of every pair of the data set, at the `thresholds` of the protocol's settings."""
    samples = {sample.key: sample for sample in task.data.test}
    counts = []
    for pair in task.data.pairs:
        source, target = (task.stored.map(samples[key]) for key in (pair.source, pair.target))
        found = match_points(source, target, np.array(pair.source_points, np.float64).reshape(-1, 2))
        errors = np.linalg.norm(found - np.array(pair.target_points, np.float64).reshape(-1, 2), axis=1)
        counts.append(count_points(errors, scale=pair.scale, thresholds=task.settings.thresholds))
    return gather([pair.key for pair in task.data.pairs], counts)


def pck_figures(sums: Sums, settings: Any) -> dict[str, float]:
    """PCK in percent, at the `thresholds` of the protocol's settings."""
    return pck_of(sums, settings.thresholds)
