"""Owns the meters of a run: numbers that tell, from features alone, whether it learns, collapses, or loses its patches.

All are functions of tensors, float64 or float32 inside, without gradient and without randomness. Shapes: `n` samples,
`B` images, `N` patches of an image, `D` channels, `K` prototypes. What they say is in `densedino.pretrain.diagnosis`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F

from densedino.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from densedino.pretrain.prototypes import PrototypeTargets

__all__ = [
    "Drift",
    "cls_patch_cosine",
    "coherence",
    "demand_entropy",
    "drift_matrix",
    "effective_rank",
    "feature_std",
    "near_and_far",
    "patch_similarity",
    "similarity_drift",
    "target_entropy",
]

_EPS = 1e-7  # RankMe's, added to the shares


@torch.no_grad()
def feature_std(features: Tensor) -> float:
    """How far L2-normalised features [n, D] spread: 0 if all point the same way, 1 if in all directions alike.

    The standard deviation over samples, averaged over channels, times √D (SimSiam, arXiv 2011.10566, §4.1).
    """
    unit = F.normalize(features.float(), dim=-1)
    return float(unit.std(dim=0, correction=0).mean()) * math.sqrt(features.shape[-1])


@torch.no_grad()
def effective_rank(features: Tensor) -> float:
    """RankMe of features [n, D]: exp of the entropy of the normalised singular values (arXiv 2210.02885, eq. 2).

    It lies between 1 and min(n, D). Compare values of equal n only; the paper uses n = 25,600.
    """
    values = torch.linalg.svdvals(features.double())
    shares = values / values.sum().clamp(min=torch.finfo(torch.float64).tiny) + _EPS
    return float((-shares * shares.log()).sum().exp())


@torch.no_grad()
def demand_entropy(bias: Tensor) -> float:
    """How evenly the teacher would use K prototypes if Sinkhorn-Knopp did not balance them, 0 to 1, from its bias [K].

    The bias u offsets what each prototype draws (`sinkhorn_bias`), so softmax(−u) is the demand it met: 1 if all are
    in demand alike, 0 if one takes all. Costs O(K): no logits are needed.
    """
    return float(_entropy(torch.log_softmax(-bias.double(), dim=-1))) / max(math.log(len(bias)), _EPS)


@torch.no_grad()
def target_entropy(targets: PrototypeTargets, *, samples: int = 256) -> float:
    """Mean entropy of the teacher's targets over log K: 0 if each picks one prototype, 1 if it picks none.

    Args:
        targets: of the step.
        samples: how many, evenly spaced, are read; each is K numbers.

    Raises:
        InputError: there are no targets.
    """
    if not len(targets):
        raise InputError("the entropy of no targets was asked for: this process had no teacher samples in the step.")
    total, count = 0.0, min(samples, len(targets))
    for i in range(count):
        place = i * len(targets) // count
        total += float(_entropy(targets.part(place, place + 1).log()).sum())
    return total / count / max(math.log(len(targets.bias)), _EPS)


def _entropy(log_p: Tensor) -> Tensor:
    return -(log_p.exp() * log_p.clamp(min=-1e4)).sum(-1)  # 0·log 0 is 0


@torch.no_grad()
def patch_similarity(patches: Tensor) -> Tensor:
    """Cosines between the patches of each image: [B, N, D] → [B, N, N], what Gram anchoring holds (DINOv3 §4.2)."""
    unit = F.normalize(patches.float(), dim=-1)
    return unit @ unit.mT


class Drift(NamedTuple):
    """How the patch similarities of images moved from where they were."""

    structure: float
    """1 − the correlation of the cosines then and now, mean over images: 0 the same order of likeness, 1 none left."""
    distance: float
    """Mean squared difference of the cosines: the Gram loss (DINOv3 §4.2) that the reference would give."""


@torch.no_grad()
def similarity_drift(patches: Tensor, reference: Tensor) -> Drift:
    """How the patch-patch similarities of the same B images differ between two models, [B, N, D] and [B, N, D'].

    Only pairs of different patches count. No labels, and no common basis: D' may differ from D.

    Raises:
        InputError: the number of images or patches differs, or there are fewer than 3 patches.
    """
    if patches.shape[:2] != reference.shape[:2] or patches.shape[1] < 3:
        raise InputError(
            f"patches {tuple(patches.shape)} and reference {tuple(reference.shape)} must be of the same images and "
            "grid, with at least 3 patches: [B, N, D]."
        )
    row, col = torch.triu_indices(patches.shape[1], patches.shape[1], 1, device=patches.device)
    now, then = (patch_similarity(x)[:, row, col].double() for x in (patches, reference))
    distance = float((now - then).square().mean())
    a, b = (x - x.mean(1, keepdim=True) for x in (now, then))
    lengths = a.norm(dim=1) * b.norm(dim=1)
    floor = 1e-9 * row.numel()  # below it the cosines of an image are one constant, and have no order
    alike = torch.where(lengths > floor, (a * b).sum(1) / lengths.clamp(min=floor), 0.0)
    return Drift(structure=float(1 - alike.mean()), distance=distance)


@torch.no_grad()
def near_and_far(patches: Tensor) -> tuple[float, float]:
    """Mean cosine of neighbouring patches, and of patches at least half the grid apart, of [B, h, w, D].

    Both rise when patches come to carry a part that is common to the image, as they do in long training (DINOv3
    §4.1); `coherence` tells whether that costs anything.

    Raises:
        InputError: the grid is smaller than 2×2.
    """
    _, h, w, _ = patches.shape
    if h < 2 or w < 2:
        raise InputError(f"a grid of {h}×{w} patches has no neighbours in both directions; use larger images.")
    similarity = patch_similarity(patches.flatten(1, 2)).mean(0)
    y, x = torch.meshgrid(*(torch.arange(n, device=patches.device) for n in (h, w)), indexing="ij")
    dy, dx = ((p.flatten()[:, None] - p.flatten()).abs() for p in (y, x))
    near, far = dy + dx == 1, (2 * dy >= h) | (2 * dx >= w)
    return float(similarity[near].mean()), float(similarity[far].mean())


@torch.no_grad()
def coherence(patches: Tensor) -> float:
    """Mean cosine of neighbouring patches of [B, h, w, D], each without the mean patch of its image: at most 1.

    It falls when patches become noisy or lose their place to artefacts, which is what harms dense tasks. What all
    patches of an image have in common does not count: a linear map or a similarity map can do without it.

    Raises:
        InputError: the grid is smaller than 2×2.
    """
    return near_and_far(patches.float() - patches.float().mean((1, 2), keepdim=True))[0]


@torch.no_grad()
def cls_patch_cosine(cls: Tensor, patches: Tensor) -> float:
    """Mean cosine between the CLS token [B, D] and the patches [B, N, D] of its image.

    It rises through a long training as patches come to carry the whole image instead of their place (DINOv3 §4.1).
    """
    return float(F.cosine_similarity(cls.float()[:, None], patches.float(), dim=-1).mean())


@torch.no_grad()
def drift_matrix(looks: Sequence[Tensor]) -> Tensor:
    """The structural drift between every two looks, each patches [B, N, D] of the same images: float64 [n, n]."""
    n = len(looks)
    drifts = torch.zeros(n, n, dtype=torch.float64)
    row, col = torch.triu_indices(looks[0].shape[1], looks[0].shape[1], 1)
    for image in range(looks[0].shape[0]):
        cosines = torch.stack([patch_similarity(patches[image])[row, col] for patches in looks]).double()
        centred = F.normalize(cosines - cosines.mean(1, keepdim=True), dim=1)
        drifts += (1 - centred @ centred.T) / looks[0].shape[0]
    return drifts.clamp(min=0).fill_diagonal_(0)
