"""Owns the way from logits over bins to depth or height in metres (as AdaBins, Bhat et al. 2021, with fixed bins)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Bins", "bin_centres", "depth_of"]

_INNER = 8.0  # canopy heights are weighed in units of eight metres, which cancels but for the limits of rounding
_TINY = 1e-12


@dataclass(frozen=True, kw_only=True)
class Bins:
    """A range of depth in bins, and how logits over them become weights."""

    number: int = 256
    least: float = 0.001
    """Metres."""
    most: float
    """Metres."""
    spacing: Literal["linear", "log", "mixlog"] = "linear"
    """mixlog: logarithmic near, linear far; its weights vanish where logits do not rise above zero."""


def bin_centres(bins: Bins, like: Tensor) -> Tensor:
    """Centres [K] of the bins; those of mixlog in units of 8 m."""
    import torch

    def line(start: float, end: float) -> Tensor:
        return torch.linspace(start, end, bins.number, device=like.device)

    if bins.spacing == "linear":
        return line(bins.least, bins.most)
    if bins.spacing == "log":
        return line(math.log(bins.least), math.log(bins.most)).exp()
    most = bins.most / _INNER
    near = line(1.0, 0.0)
    return near * line(math.log(bins.least), math.log(most)).exp() + (1 - near) * line(bins.least, most)


def depth_of(logits: Tensor, bins: Bins) -> Tensor:
    """Logits [B, K, h, w] to depth [B, 1, h, w] in metres, the mean of the bins under the logits' weights."""
    if logits.shape[1] == 1:
        return logits.relu() + bins.least
    centres = bin_centres(bins, logits)[:, None, None]
    raised = logits.relu()
    if bins.spacing != "mixlog":
        raised = raised + 0.1
        return ((raised / raised.sum(1, keepdim=True)) * centres).sum(1, keepdim=True)
    raised = raised + 1e-8
    total = raised.sum(1, keepdim=True)
    weights = raised / total.where(total.isfinite(), total.new_ones(())).clamp(min=_TINY)
    return _INNER * (weights * centres.clamp(min=_TINY)).sum(1, keepdim=True).clamp(min=_TINY)
