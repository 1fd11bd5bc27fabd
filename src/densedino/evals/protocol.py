"""Owns what a protocol is: a way to judge stored features, told apart from where they come from and who asks."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from densedino.errors import UnknownNameError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from densedino.evals.datasets import Dataset, Sample
    from densedino.evals.metrics import Counts, Sums
    from densedino.evals.tokens import Tokens

__all__ = ["PROTOCOLS", "Protocol", "Scores", "Task", "find_protocol", "gather"]

PROTOCOLS = {
    "knn": "k nearest neighbours of CLS: images with classes",
    "linear": "a linear classifier on CLS and mean patch: images with classes",
    "logistic": "logistic regression on CLS, its strength chosen on a held-out part: images with classes",
    "segmentation": "a linear and a k-NN probe of patches, mean IoU and boundary F: images with masks",
    "depth": "a linear probe of patches over depth bins: images with depths",
    "retrieval": "mean average precision of instance retrieval: Oxford, Paris, or images with classes",
    "copies": "copy detection: references, queries, and which is a copy of which",
    "discovery": "objects found without labels, CorLoc: images with boxes or masks",
    "keypoints": "PCK of semantic keypoints: SPair, or pairs of images with points",
    "homography": "PCK of points under known homographies: HPatches-like folders",
    "tracking": "masks carried through a video from its first frame, J and F: DAVIS",
}
"""Verb and what it takes; the module of that name in this folder has the protocol."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a protocol is asked to judge."""

    data: Dataset
    train: Sequence[Sample]
    """Those of `data.train` that may be learned from: fewer in low-shot."""
    tokens: Tokens | None
    """None for networks that are trained end to end."""
    seed: int
    settings: Any
    """Of the protocol's own class."""

    @property
    def stored(self) -> Tokens:
        """The tokens, where there must be some."""
        assert self.tokens is not None
        return self.tokens


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What was found, image by image."""

    keys: tuple[str, ...]
    """Of what is judged one by one: images, queries, pairs, sequences."""
    counts: Mapping[str, NDArray[Any]]
    """Sums of each of them, [n, …]; see `evals.metrics`."""
    head: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    """What was learned, if it is kept: with the features, it gives the predictions again."""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """A way to judge features."""

    name: str
    find: Callable[[Path], Dataset]
    settings: type
    """A frozen dataclass."""
    heads: Callable[[Any], Sequence[str]]
    """Ways to use the features, given the settings: each is a row of the results."""
    evaluate: Callable[[str, Task], Scores]
    """Judge by that head."""
    figures: Callable[[Sums, Any], dict[str, float]]
    """Of sums and settings: the metrics, the most important one first."""
    rule: str
    """How tokens become what is judged, in words."""
    resize: int | tuple[int, int] | None = None
    """What images are resized to unless the plan says otherwise."""
    random_heads: frozenset[str] = frozenset()
    """Heads whose result depends on the seed also when they learn from all samples."""
    supervised: Mapping[str, Callable[[Task], Scores]] = field(default_factory=dict)
    """Networks that are trained end to end on the same data, as baselines."""
    learns: bool = True
    """Whether anything is learned from `train`."""


def find_protocol(name: str) -> Protocol:
    """The protocol of that name.

    Raises:
        UnknownNameError: there is none.
    """
    if name not in PROTOCOLS:
        raise UnknownNameError("protocol", name, PROTOCOLS, hint="A plan is a file that ends in .py.")
    protocol: Protocol = importlib.import_module(f"densedino.evals.{name}").PROTOCOL
    return protocol


def gather(keys: Sequence[str], counts: Sequence[Counts], *, head: Mapping[str, NDArray[Any]] | None = None) -> Scores:
    """Scores of what was counted one by one."""
    stacked = {name: np.stack([one[name] for one in counts]) for name in counts[0]}
    return Scores(keys=tuple(keys), counts=stacked, head=head or {})
