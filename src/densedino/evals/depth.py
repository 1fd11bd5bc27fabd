"""Owns the depth protocol: a linear probe of patches over depth bins, trained by the scale-invariant log loss."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from densedino.errors import ImageError
from densedino.evals.maps import find_depths, read_depth
from densedino.evals.metrics import count_depth, depth_of
from densedino.evals.pixel_probe import Fitting, fit_probe
from densedino.evals.protocol import Protocol, Scores, Task, gather

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from densedino.evals.datasets import Sample
    from densedino.evals.metrics import Sums

__all__ = ["PROTOCOL", "Settings", "depth_from_bins", "sig_loss"]

_EIGEN = (slice(45, 471), slice(41, 601))
"""Of NYUv2's 480×640 pixels, those that are judged (Eigen et al., arXiv 1406.2283)."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """DINOv2's linear depth (arXiv 2304.07193, §7.4): bins evenly from `nearest` to `farthest` metres."""

    bins: int = 256
    nearest: float = 1e-3
    farthest: float = 10.0
    fitting: Fitting = field(default_factory=lambda: Fitting(pixel_stride=16))


def depth_from_bins(outputs: Tensor, settings: Settings) -> Tensor:
    """Depth [P] in metres of outputs [P, bins]: the mean bin, weighted by ReLU(output) + 0.1."""
    weights = outputs.relu() + 0.1
    bins = torch.linspace(settings.nearest, settings.farthest, settings.bins)
    return (weights @ bins) / weights.sum(-1)


def sig_loss(predicted: Tensor, true: Tensor) -> Tensor:
    """sqrt(var(d) + 0.15 mean(d)²) of d = ln predicted − ln true [P] (AdaBins; var divides by P − 1)."""
    d = predicted.log() - true.log()
    return (d.var() + 0.15 * d.mean() ** 2).clamp(min=1e-12).sqrt()


def evaluate(head: str, task: Task) -> Scores:
    """Judge every test image at the size of its depth map."""
    settings: Settings = task.settings
    kept = {i: _checked(sample, task) for i, sample in enumerate(task.train[:4096])}

    def depths_of(i: int) -> Tensor:
        return torch.from_numpy(kept[i] if i in kept else _checked(task.train[i], task))

    def loss(found: Tensor, wanted: Tensor) -> Tensor:
        real = (wanted > settings.nearest) & (wanted <= settings.farthest)
        if int(real.sum()) < 2:
            return found.sum() * 0
        return sig_loss(depth_from_bins(found[real], settings), wanted[real])

    probe = fit_probe(
        lambda i: task.stored.map(task.train[i]),
        depths_of,
        count=len(task.train),
        outputs=settings.bins,
        loss=loss,
        fitting=settings.fitting,
        seed=task.seed,
        start=1.0,  # ReLU learns nothing from 0
    )
    counts = []
    for sample in task.data.test:
        true, tokens = _checked(sample, task), task.stored.map(sample, keep=False)
        rows = [
            depth_from_bins(probe(tokens, rows=slice(top, top + 32)), settings) for top in range(0, true.shape[0], 32)
        ]
        valid = (true > settings.nearest) & (true <= settings.farthest)
        if task.data.layout == "NYUv2" and true.shape == (480, 640):
            inside = np.zeros_like(valid)
            inside[_EIGEN] = True
            valid &= inside
        if not valid.any():
            raise ImageError(f"the depth map {str(sample.target)!r} has no depth up to {settings.farthest:g} m.")
        counts.append(count_depth(torch.cat(rows).numpy(), true, valid=valid))
    return gather([sample.key for sample in task.data.test], counts, head=probe.arrays())


def _checked(sample: Sample, task: Task) -> NDArray[np.float32]:
    depth, size = read_depth(sample, task.data), task.stored.map(sample).source_size
    if depth.shape != size:
        raise ImageError(
            f"the depth map {str(sample.target)!r} has {depth.shape[0]}×{depth.shape[1]} pixels (H×W), its image "
            f"{size[0]}×{size[1]}. Make them one size."
        )
    return depth.astype(np.float32)


def figures(sums: Sums, settings: Settings) -> dict[str, float]:
    """RMSE in metres first."""
    return depth_of(sums)


PROTOCOL = Protocol(
    name="depth",
    find=find_depths,
    settings=Settings,
    heads=lambda settings: ("linear bins",),
    evaluate=evaluate,
    figures=figures,
    rule="Patches after the final norm; outputs over bins are interpolated bilinearly to pixels; no flips.",
    random_heads=frozenset({"linear bins"}),
)
