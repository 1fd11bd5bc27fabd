"""Owns the change map of two scenes on one grid, as a COG of values per pixel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from densedino.errors import InputError
from densedino.features.change import patch_change
from densedino.features.colours import otsu_threshold
from densedino.geo.pixel_maps import cog_writer, own_rows, strips, to_pixels

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from densedino.features.scenes import SceneStore

__all__ = ["SceneChange", "change_scenes"]

_SAMPLE = 20_000  # patches of each date, for its mean


@dataclass(frozen=True, kw_only=True)
class SceneChange:
    """What a comparison came to."""

    patches: int
    """Known at both dates."""
    threshold: float
    """Between little and much change, by Otsu's rule: a proposal."""
    changed: float
    """The share of patches above it."""


def change_scenes(
    before: SceneStore,
    after: SceneStore,
    *,
    output: Path,
    per_patch: bool = False,
    advance: Callable[[int], None] = lambda rows: None,
) -> SceneChange:
    """Write how much each pixel changed (see `patch_change`) as a COG of one float band, NaN where one has no data.

    Raises:
        InputError: the scenes are not on one grid, or were not made by one model.
        StoreError: a store cannot be read.
    """
    _check(before, after)
    samples = (torch.from_numpy(store.sample(_SAMPLE).astype(np.float32)) for store in (before, after))
    old, new = (sample.mean(0) for sample in samples)
    seen: list[torch.Tensor] = []
    tags = {"SOFTWARE": "densedino", "WEIGHTS": f"{before.card.name} {before.card.sha256}"}
    nan = float("nan")
    with cog_writer(
        output, after, bands=("change",), dtype="float32", nodata=nan, tags=tags, per_patch=per_patch
    ) as write:
        for (top, was, known), (_, now, also) in zip(strips(before), strips(after), strict=True):
            known = known & also
            change = patch_change(torch.from_numpy(was), torch.from_numpy(now), centre=(old, new))
            own = own_rows(top, after)
            seen.append(change[own][torch.from_numpy(known[own])])
            if per_patch:
                values, mask = change[own][None], torch.from_numpy(known[own])
            else:
                values, mask = to_pixels(change[..., None], known, top=top, store=after)
            write(top if per_patch else top * after.stride, torch.where(mask, values, torch.nan).numpy())
            advance(own.stop - own.start)
    values = torch.cat(seen)
    if not len(values):
        raise InputError("the two scenes have no place in common where both have data.")
    threshold = otsu_threshold(values)
    changed = float((values > threshold).float().mean())
    return SceneChange(patches=len(values), threshold=threshold, changed=changed)


def _check(before: SceneStore, after: SceneStore) -> None:
    for name, old, new in (
        ("size", before.metadata["scene"]["size"], after.metadata["scene"]["size"]),
        ("affine", np.round(before.affine, 6).tolist(), np.round(after.affine, 6).tolist()),
        ("CRS", before.crs, after.crs),
        ("weights", before.card.sha256[:12], after.card.sha256[:12]),
    ):
        if old != new:
            raise InputError(
                f"the scenes differ in {name}: {str(old)[:80]} and {str(new)[:80]}. They need one grid and one model. "
                "Fix: bring one onto the other's grid (gdalwarp -t_srs … -te … -ts …), and extract both alike."
            )
