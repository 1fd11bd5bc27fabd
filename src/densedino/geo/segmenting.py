"""Owns the map of a scene from few labels: a head on stored patches, predicted strip by strip, with confidence."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from densedino.adapters.few_clicks import fit_head
from densedino.adapters.photo_masks import COLOURS
from densedino.errors import StoreError
from densedino.geo.pixel_maps import cog_writer, own_rows, strips, to_pixels
from densedino.geo.scene_labels import read_scene_labels, tokens_at

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

    from densedino.adapters.few_clicks import Head
    from densedino.features.scenes import SceneStore

__all__ = ["SceneMap", "segment_scene"]


@dataclass(frozen=True, kw_only=True)
class SceneMap:
    """What a map of a scene came to."""

    classes: tuple[str, ...]
    patches: int
    """That the head was fitted on."""
    fitted_seconds: float
    shares: tuple[float, ...]
    """Of the known pixels, by class."""
    confidence: float
    """Mean over the known pixels, 0 to 1."""


def segment_scene(
    store: SceneStore,
    labels: Path,
    *,
    output: Path,
    head: Head = "linear",
    field: str | None = None,
    per_patch: bool = False,
    fitted: Callable[[tuple[str, ...], int, float], None] = lambda classes, patches, seconds: None,
    advance: Callable[[int], None] = lambda rows: None,
) -> SceneMap:
    """Fit a head on the labelled patches and write what every pixel of the scene is, as a COG of two bands.

    Band 1 is the class: 1 for the first; 0 where the scene has no data. Band 2 is its probability by the head, 0 to
    255. The names are in the file's metadata (`CLASS_1=water`).

    Args:
        store: of the scene; complete.
        labels: see `read_scene_labels`.
        output: a name that ends in .tif.
        head: see `fit_head`.
        field: of GeoJSON, the property that is the class.
        per_patch: one pixel per patch, instead of the scene's own pixels.
        fitted: called with the classes, the number of patches, and the seconds, when the head is fitted.
        advance: called with the number of rows of patches that were predicted.

    Raises:
        StoreError: the store is not complete, or cannot be read.
        InputError: labels that cannot be used, or an output that cannot be written.
    """
    if not store.complete:
        raise StoreError(f"{store} is not complete. Run the same densedino extract again first: it goes on.")
    samples = read_scene_labels(labels, store, field=field)
    tokens, shares = tokens_at(store, samples)
    start = time.perf_counter()
    score = fit_head(tokens, shares, head=head)
    seconds = time.perf_counter() - start
    fitted(samples.classes, len(tokens), seconds)
    counts, sure = np.zeros(len(samples.classes) + 1, np.int64), 0
    names = {f"CLASS_{number}": name for number, name in enumerate(samples.classes, start=1)}
    tags = {"SOFTWARE": "densedino", "WEIGHTS": f"{store.card.name} {store.card.sha256}", **names}
    colours = {number + 1: COLOURS[number % len(COLOURS)] for number in range(len(samples.classes))}
    with cog_writer(
        output,
        store,
        bands=("class", "confidence"),
        dtype="uint8",
        nodata=0,
        tags=tags,
        per_patch=per_patch,
        colours=colours,
    ) as write:
        for top, patches, known in strips(store):
            values, mask = _scores(score(torch.from_numpy(patches)), known, top, store, per_patch)
            best, label = values.softmax(0).max(0)
            number = torch.where(mask, label + 1, 0).byte().numpy()
            certain = torch.where(mask, best * 255, 0).round().byte().numpy()
            write(top if per_patch else top * store.stride, np.stack([number, certain]))
            counts += np.bincount(number.reshape(-1), minlength=len(counts))
            sure += int(certain.sum(dtype=np.int64))
            advance(len(number) if per_patch else len(number) // store.stride)
    known_pixels = max(int(counts[1:].sum()), 1)
    return SceneMap(
        classes=samples.classes,
        patches=len(tokens),
        fitted_seconds=seconds,
        shares=tuple((counts[1:] / known_pixels).tolist()),
        confidence=sure / 255 / known_pixels,
    )


def _scores(
    scores: torch.Tensor, known: NDArray[np.bool_], top: int, store: SceneStore, per_patch: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the strip's own rows: [C, H, W], and which are known [H, W]."""
    if not per_patch:
        return to_pixels(scores, known, top=top, store=store)
    own = own_rows(top, store)
    return scores[own].permute(2, 0, 1), torch.from_numpy(known[own])
