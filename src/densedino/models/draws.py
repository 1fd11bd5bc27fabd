"""Owns what chance decides in one training forward, drawn beforehand: a backbone itself never draws."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Draws", "Kept"]


class Kept(NamedTuple):
    """Stochastic depth of one residual branch: it is run on some samples, and what it gives is multiplied."""

    samples: Tensor
    """[k] int64, rising: which samples of the batch; the others keep what they have."""
    scale: float
    """1 / (1 − rate), so that the expected sum is that without stochastic depth."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Draws:
    """For one batch; `densedino.pretrain.draws` makes them, by count. The default is none at all."""

    kept: tuple[Kept, ...] = ()
    """For each residual branch in the order of execution (a ViT's block has two, a ConvNeXt's one); (): all run."""
    warps: tuple[Tensor, ...] = ()
    """Changes of a ViT's patch coordinates, of `RopeAugment.draw`: one for all blocks or one for each; (): none."""
