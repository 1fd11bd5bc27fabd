"""Owns change between two pictures of one place: how far patches have turned, apart from what changed everywhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from PIL import Image

from densedino.errors import InputError
from densedino.features.colours import heat_colours, otsu_threshold
from densedino.features.pictures import Picture, picture_size
from densedino.features.tokens import upsample_tokens

if TYPE_CHECKING:
    from torch import Tensor

    from densedino.features.tokens import Features

__all__ = ["change_picture", "patch_change", "photo_change"]


def patch_change(before: Tensor, after: Tensor, *, centre: tuple[Tensor, Tensor]) -> Tensor:
    """1 − cosine [...] of tokens [..., D] of two dates, each less its date's mean: 0 for no change, up to 2.

    Subtracting the means takes out what is common to all patches of a date: light, season, sensor.
    """
    old, new = (tokens.float() - mean for tokens, mean in zip((before, after), centre, strict=True))
    return 1 - F.cosine_similarity(old, new, dim=-1)


def photo_change(before: Features, after: Features) -> tuple[Tensor, float]:
    """Change [h, w] between two photographs, NaN where one is not known, and the threshold between little and much.

    Raises:
        InputError: they were not seen at one size, or have no valid patch in common.
    """
    if before.grid != after.grid or before.input_sizes != after.input_sizes:
        raise InputError(
            f"the pictures were seen at {before.input_sizes[0]} and {after.input_sizes[0]} pixels (H×W); change needs "
            "two of one size that show one place from one point."
        )
    valid = (before.valid[0] & after.valid[0]).cpu()
    if not bool(valid.any()):
        raise InputError("the two pictures have no valid patch in common.")
    old, new = before.patches[0].cpu().float(), after.patches[0].cpu().float()
    change = patch_change(old, new, centre=(old[valid].mean(0), new[valid].mean(0)))
    return torch.where(valid, change, torch.nan), otsu_threshold(change[valid])


def change_picture(change: Tensor, features: Features, *, long_side: int) -> Picture:
    """Heat colours of `change` [h, w] over the pixels of the photograph that `features` are of."""
    size = picture_size(features.source_sizes[0], long_side)
    known = change.isfinite()
    both = torch.stack([change.nan_to_num(0.0), known.float()], -1)[None]
    values, weight = upsample_tokens(both, size, extent=features.input_sizes[0], stride=features.stride)[0]
    low, high = 0.0, max(float(change[known].max()), 1e-6)
    rgb = heat_colours(values / weight.clamp(min=1e-6) / high)
    image = Image.fromarray((rgb * 255).round().byte().numpy())
    return Picture(image=image, title="change: 1 − cosine", scale=(low, high))
