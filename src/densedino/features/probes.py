"""Owns the probes: what frozen features are worth to a nearest-neighbour vote and to a linear segmentation.

Pure functions of tensors: deterministic, no random numbers, no files. Shapes: `n` samples, `D` channels, `C` classes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from densedino.errors import InputError
from densedino.features.tokens import upsample_tokens

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "LinearProbe",
    "confusion_matrix",
    "fit_linear_probe",
    "knn_vote",
    "mean_iou",
    "patch_shares",
]


@torch.no_grad()
def knn_vote(
    queries: Tensor,
    bank: Tensor,
    labels: Tensor,
    *,
    num_classes: int,
    k: int = 20,
    temperature: float | None = 0.07,
    block: int = 1024,
) -> Tensor:
    """Class of each query [n, D] by a vote of its k nearest in the bank [m, D] by cosine: int64 [n].

    Args:
        queries: features, normalised here. Give float64 where features may hardly differ, as those of an untrained
            model: cosines within 1e-7 of 1 are all the same in float32.
        bank: labelled features of the same type, normalised here.
        labels: [m] int64, 0 to C − 1.
        num_classes: C.
        k: votes; at most m are used.
        temperature: a vote weighs exp(cosine / temperature), as in DINO (arXiv 2104.14294, §4.1 and InstDisc);
            None: all weigh the same. Of classes with equal votes the one with the nearest neighbour is taken.
        block: queries compared at once.

    Raises:
        InputError: the bank is empty, has no label for each sample, or labels that are no class.
    """
    if not len(bank) or len(bank) != len(labels) or int(labels.min()) < 0 or int(labels.max()) >= num_classes:
        raise InputError(
            f"a bank of {len(bank)} features with {len(labels)} labels for {num_classes} classes: there must be at "
            f"least one, one label for each, from 0 to {num_classes - 1}."
        )
    bank = F.normalize(bank, dim=-1)
    winners = []
    for part in queries.split(block):
        cosines, places = (F.normalize(part, dim=-1) @ bank.T).topk(min(k, len(bank)))
        voted = labels[places]
        weights = torch.ones_like(cosines) if temperature is None else ((cosines - 1) / temperature).exp()
        votes = cosines.new_zeros(len(part), num_classes).double().scatter_add_(1, voted, weights.double())
        best = votes.amax(1, keepdim=True)
        tied = votes.gather(1, voted) >= best * (1 - 1e-12)  # neighbours, nearest first, whose class has most votes
        winners.append(voted.gather(1, tied.int().argmax(1, keepdim=True))[:, 0])
    return torch.cat(winners) if winners else labels[:0]


@torch.no_grad()
def confusion_matrix(predicted: Tensor, true: Tensor, *, num_classes: int, ignore: int | None = None) -> Tensor:
    """Count pixels [true, predicted] of integer maps of one shape: int64 [C, C], which add up exactly.

    Raises:
        InputError: the shapes differ, or a label is neither a class nor `ignore`.
    """
    if predicted.shape != true.shape:
        raise InputError(f"predictions {tuple(predicted.shape)} and labels {tuple(true.shape)} differ in shape.")
    counted = torch.ones_like(true, dtype=torch.bool) if ignore is None else true != ignore
    t, p = true[counted].long(), predicted[counted].long()
    if t.numel() and (int(torch.stack([t, p]).min()) < 0 or int(torch.stack([t, p]).max()) >= num_classes):
        raise InputError(
            f"labels go to {int(t.max())} and predictions to {int(p.max())}, from {int(torch.stack([t, p]).min())}; "
            f"valid are 0 to {num_classes - 1}" + ("." if ignore is None else f" and {ignore} (ignored).")
        )
    return torch.bincount(t * num_classes + p, minlength=num_classes**2).view(num_classes, num_classes)


def mean_iou(confusion: Tensor) -> float:
    """Mean over classes of intersection over union of int64 counts [C, C]; classes that never occur do not count.

    NaN if there is none.
    """
    counts = confusion.double()
    hits = counts.diagonal()
    union = counts.sum(0) + counts.sum(1) - hits
    return float((hits / union)[union > 0].mean())


@torch.no_grad()
def patch_shares(labels: Tensor, *, grid: tuple[int, int], num_classes: int, ignore: int) -> Tensor:
    """The share of each class in each patch of a map [H, W]: float [h, w, C]; all 0 where only `ignore` is.

    A pixel belongs to the patch that its centre falls on, whatever the ratio of sizes.
    """
    height, width = labels.shape
    rows = ((torch.arange(height) * 2 + 1) * grid[0]).div(2 * height, rounding_mode="floor")
    cols = ((torch.arange(width) * 2 + 1) * grid[1]).div(2 * width, rounding_mode="floor")
    patch = rows[:, None] * grid[1] + cols
    counted = labels != ignore
    flat = patch[counted] * num_classes + labels[counted].long()
    counts = torch.bincount(flat, minlength=grid[0] * grid[1] * num_classes).view(*grid, num_classes).float()
    return counts / counts.sum(-1, keepdim=True).clamp(min=1)


class LinearProbe:
    """Scores of classes as an affine map of tokens: what batch normalisation and a 1×1 convolution are together."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.weight = weight
        """[D, C]."""
        self.bias = bias
        """[C]."""

    def predict(self, patches: Tensor, size: tuple[int, int]) -> Tensor:
        """Classes at the pixels of an image: patches [h, w, D] → int64 `size`; scores are interpolated, not classes."""
        scores = patches.float() @ self.weight + self.bias
        return upsample_tokens(scores[None], size)[0].argmax(0)


def fit_linear_probe(
    tokens: Tensor, shares: Tensor, *, penalty: float = 1e-3, iterations: int = 60
) -> tuple[LinearProbe, float]:
    """Fit multinomial logistic regression of class shares on standardised tokens, from zero, by L-BFGS on all at once.

    It is convex, so the answer depends on the data alone: no learning rate, no seed, no order of batches.

    Args:
        tokens: [n, D] frozen patch tokens.
        shares: [n, C] targets, rows summing to 1, or to 0 for a token that is not counted.
        penalty: times half the squared weights, added to the mean cross-entropy.
        iterations: at most; it stops earlier when it has converged.

    Returns:
        The probe; and the mean cross-entropy that it reached.

    Raises:
        InputError: no token is counted.
    """
    counted = shares.sum(-1) > 0
    if not bool(counted.any()):
        raise InputError("a linear probe needs labels: every pixel of every mask is of the ignored label.")
    x, y = tokens[counted].float(), shares[counted].float()
    mean, std = x.mean(0), x.std(0, correction=0).clamp(min=1e-6)
    x = (x - mean) / std
    with torch.enable_grad():
        weight = torch.zeros(x.shape[1], y.shape[1], device=x.device, requires_grad=True)
        bias = torch.zeros(y.shape[1], device=x.device, requires_grad=True)
        solver = torch.optim.LBFGS(
            [weight, bias], max_iter=iterations, history_size=10, line_search_fn="strong_wolfe", tolerance_grad=1e-5
        )

        def loss() -> Tensor:
            solver.zero_grad()
            value = F.cross_entropy(x @ weight + bias, y)
            (value + penalty / 2 * weight.square().sum()).backward()
            return value + penalty / 2 * weight.detach().square().sum()

        solver.step(loss)
    with torch.no_grad():
        reached = float(F.cross_entropy(x @ weight + bias, y))
        plain = weight / std[:, None]
        return LinearProbe(plain, bias - mean @ plain), reached
