"""Owns choosing images by their CLS tokens: groups of near-duplicates, and few that stand for all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch

from densedino.errors import InputError, UnknownNameError
from densedino.features.neighbours import unit

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from densedino.features.store import FeatureStore

__all__ = ["Diverse", "diverse", "duplicates", "image_vectors"]

Diverse = Literal["k-center", "cluster"]

_BLOCK = 2048
_PASSES = 20


def image_vectors(store: FeatureStore) -> NDArray[np.float32]:
    """CLS [n, D] of all rows, less their mean, of length 1.

    The mean is common to all images and tells none from another; without it, unrelated images have cosines about 0.

    Raises:
        InputError: there are fewer than two images.
    """
    if len(store) < 2:
        raise InputError(f"{store}: choosing needs at least two images.")
    cls = np.concatenate([batch["cls"] for batch in store.batches(columns=["cls"])]).astype(np.float32)
    return unit(cls - cls.mean(0))


def duplicates(vectors: NDArray[np.float32], *, threshold: float) -> list[list[int]]:
    """Groups of two or more rows that are linked by cosines of at least `threshold`, each in order; exact.

    Args:
        vectors: [n, D] of length 1. Every pair is compared, in blocks: n² · D multiplications.
        threshold: of the cosine.

    Raises:
        InputError: the threshold is not between -1 and 1.
    """
    if not -1 < threshold <= 1:
        raise InputError(f"threshold {threshold}: a cosine is between -1 and 1; near-duplicates have 0.9 and more.")
    head = np.arange(len(vectors))

    def find(i: int) -> int:
        while head[i] != i:
            head[i] = head[head[i]]
            i = int(head[i])
        return i

    tensor = torch.from_numpy(vectors)
    for start in range(0, len(vectors), _BLOCK):
        part = tensor[start : start + _BLOCK]
        near = part @ tensor[start:].T >= threshold
        for i, j in torch.nonzero(near.triu(1)).tolist():
            one, other = sorted((find(start + i), find(start + j)))
            head[other] = one
    groups: dict[int, list[int]] = {}
    for i in range(len(vectors)):
        groups.setdefault(find(i), []).append(i)
    return [group for group in groups.values() if len(group) > 1]


def diverse(vectors: NDArray[np.float32], *, count: int, by: Diverse = "k-center") -> list[int]:
    """`count` rows that stand for all, in the order of choice; the same on every call.

    "k-center" begins with the most typical row and adds the one that is farthest from those chosen, again and again:
    the farthest row from the choice is at most twice as far as it must be (Gonzalez 1985). It takes outliers. "cluster"
    starts there, moves to the means of clusters (k-means by direction), and takes the row nearest to each: it takes
    what is typical.

    Raises:
        UnknownNameError: no such way.
        InputError: there are not so many rows.
    """
    if by not in get_args(Diverse):
        raise UnknownNameError("way to choose", by, get_args(Diverse))
    if not 1 <= count <= len(vectors):
        raise InputError(f"{count} images are to be chosen of {len(vectors)}; give 1 to {len(vectors)}.")
    tensor = torch.from_numpy(vectors)
    chosen = [int((tensor @ tensor.mean(0)).argmax())]
    nearest = tensor @ tensor[chosen[0]]
    while len(chosen) < count:
        nearest[chosen[-1]] = torch.inf  # never again
        chosen.append(int(nearest.argmin()))
        nearest = torch.maximum(nearest, tensor @ tensor[chosen[-1]])
    if by == "k-center":
        return chosen
    centres = tensor[chosen]
    for _ in range(_PASSES):
        own = torch.cat([(part @ centres.T).argmax(1) for part in tensor.split(_BLOCK)])
        sums = torch.zeros_like(centres).index_add_(0, own, tensor)
        centres = torch.where((sums != 0).any(1, keepdim=True), torch.nn.functional.normalize(sums, dim=1), centres)
    taken: dict[int, None] = {}
    for centre in centres:
        order = (tensor @ centre).argsort(descending=True).tolist()
        taken[next(row for row in order if row not in taken)] = None
    return list(taken)
