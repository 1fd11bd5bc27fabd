"""Owns what a few points say about images: similarity to a patch, and a mask from points inside and outside of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from densedino.errors import InputError
from densedino.features.colours import otsu_threshold
from densedino.features.pictures import patch_at
from densedino.features.tokens import upsample_tokens

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from densedino.features.tokens import Features

__all__ = ["Segment", "quantise", "segment", "similarity"]

Point = tuple[float, float]


def quantise(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Directions of `tokens` [..., D] in 8 bits: int8 [..., D], and the scale [...] that makes their length 1.

    The cosine of two tokens is the product of their scales and of their int8 vectors: exact to about 0.01.
    """
    unit = F.normalize(tokens.float(), dim=-1)
    most = unit.abs().amax(-1, keepdim=True).clamp(min=1e-12)
    whole = (unit * (127 / most)).round()
    return whole.to(torch.int8), 1 / whole.norm(dim=-1).clamp(min=1.0)


def similarity(query: Tensor, features: Features) -> Tensor:
    """Cosine [h, w] of every patch of the first image to the vector `query` [D]."""
    return F.normalize(features.patches[0].float(), dim=-1) @ F.normalize(query.float(), dim=0)


@dataclass(frozen=True, kw_only=True)
class Segment:
    """What the points select."""

    scores: Tensor
    """[h, w]; the mask is where they are above `threshold`."""
    threshold: float
    mask: Tensor
    """[H, W] bool, in the pixels of the image as decoded."""


def segment(
    features: Features, *, positive: Sequence[Point], negative: Sequence[Point] = (), threshold: float | None = None
) -> Segment:
    """Select what is like the points `positive` and unlike the points `negative`.

    A patch's score is its cosine to the nearest positive point's patch, less that to the nearest negative one's. With
    negatives the threshold is 0; without, it parts the scores best (Otsu).

    Args:
        features: of one image.
        positive: (x, y) in pixels of the image as decoded.
        negative: likewise.
        threshold: instead of the rule.

    Raises:
        InputError: no positive point, or one outside of the image.
    """
    if not positive:
        raise InputError("no positive point: give at least one, as positive=x,y in pixels of the image.")
    inside = _nearest(features, positive)
    scores = inside - _nearest(features, negative) if negative else inside
    valid = features.valid[0]
    if threshold is None:
        threshold = 0.0 if negative else otsu_threshold(scores[valid] if bool(valid.any()) else scores.flatten())
    size = features.source_sizes[0]
    # Scores, not marks, are interpolated: the border then runs between patches.
    pixels = upsample_tokens(scores[None, ..., None], size, extent=features.input_sizes[0], stride=features.stride)
    return Segment(scores=scores, threshold=threshold, mask=pixels[0, 0] > threshold)


def _nearest(features: Features, points: Sequence[Point]) -> Tensor:
    """Cosine [h, w] of every patch to that of the points' patches which is most like it."""
    vectors = [features.patches[0][patch_at(features, point)] for point in points]
    return torch.stack([similarity(vector, features) for vector in vectors]).amax(0)
