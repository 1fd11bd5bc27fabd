"""Owns masks of photographs from few clicks: a head fitted on patches, its answer at the pixels, its files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageDraw

from densedino.adapters.few_clicks import Clicks, Samples, fit_head, mask_samples, samples_of
from densedino.checkpoint import atomic_path
from densedino.errors import InputError
from densedino.features.pictures import Picture, picture_size
from densedino.features.sheet import Row, draw_sheet, save_png
from densedino.features.tokens import upsample_tokens

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import Tensor

    from densedino.adapters.few_clicks import Head
    from densedino.features.tokens import Features

__all__ = ["COLOURS", "PhotoMask", "photo_head", "photo_mask", "write_photo_mask"]

COLOURS = (
    (68, 70, 79), (240, 163, 10), (27, 133, 199), (196, 52, 75), (98, 168, 76), (142, 96, 190), (0, 155, 149),
    (225, 118, 182), (148, 103, 60), (200, 200, 60), (110, 190, 230), (255, 130, 90),
)  # fmt: skip
"""Of classes in order; after the last one they begin again."""


@dataclass(frozen=True)
class PhotoMask:
    """What each pixel of a photograph is."""

    classes: tuple[str, ...]
    labels: NDArray[np.uint8]
    """[H, W]: number of the class."""
    confidence: NDArray[np.uint8]
    """[H, W]: probability of that class by the head, 0 to 255."""


def photo_head(
    features: Features, labels: Clicks | NDArray[np.int64], *, head: Head = "linear"
) -> tuple[Callable[[Tensor], Tensor], tuple[str, ...], int]:
    """Fit a head on what is labelled in one photograph.

    Args:
        features: of the photograph, B = 1.
        labels: points in its pixels, or a sparse mask of its size, 0 where nothing is said.
        head: see `fit_head`.

    Returns:
        The head, its classes, and how many patches it was fitted on.

    Raises:
        InputError: fewer than two classes, labels outside of the photograph, or a mask of another size.
    """
    samples = _samples(features, labels)
    rows, cols = torch.from_numpy(samples.cells).T
    shares = torch.from_numpy(samples.shares)
    fitted = fit_head(features.patches[0].cpu()[rows, cols], shares, head=head)
    return fitted, samples.classes, len(shares)


def _samples(features: Features, labels: Clicks | NDArray[np.int64]) -> Samples:
    (height, width), (seen_h, seen_w) = features.source_sizes[0], features.input_sizes[0]
    if isinstance(labels, Clicks):
        scale = np.array([seen_w / width, seen_h / height]) / features.stride

        def to_grid(points: NDArray[np.float64]) -> NDArray[np.float64]:
            if len(points) > 1:
                return points * scale
            (x, y) = points[0]
            inside = 0 <= x < width and 0 <= y < height  # padding is none of the photograph
            return (points + 0.5) * scale if inside else np.full((1, 2), -1.0)

        return samples_of(labels, grid=features.grid, to_grid=to_grid)
    if labels.shape != (height, width):
        raise InputError(
            f"the labels have {labels.shape[0]}×{labels.shape[1]} pixels (H×W), the photograph {height}×{width}. "
            "Give a mask of the photograph's size."
        )
    rows, cols = -seen_h % features.stride, -seen_w % features.stride  # padding, in input pixels
    padded = np.pad(labels, ((0, round(rows * height / seen_h)), (0, round(cols * width / seen_w))))
    return mask_samples(padded, grid=features.grid)


def photo_mask(features: Features, head: Callable[[Tensor], Tensor], classes: tuple[str, ...]) -> PhotoMask:
    """What the head says of a photograph, at its pixels: scores are interpolated between patches, not classes."""
    scores = head(features.patches.cpu())
    pixels = upsample_tokens(scores, features.source_sizes[0], extent=features.input_sizes[0], stride=features.stride)
    best, labels = pixels[0].softmax(0).max(0)
    return PhotoMask(classes, labels.byte().numpy(), (best * 255).round().byte().numpy())


def write_photo_mask(mask: PhotoMask, path: Path, *, photo: Image.Image, clicks: Clicks | None, heading: str) -> None:
    """Write `path` (a PNG of class numbers, coloured by its palette), and beside it `_confidence` and `_sheet`.

    Args:
        mask: what to write.
        path: ends in .png.
        photo: the photograph, for the sheet.
        clicks: drawn on the photograph.
        heading: of the sheet.
    """
    image = Image.fromarray(mask.labels, mode="P")
    image.putpalette([part for colour in _palette(len(mask.classes)) for part in colour])
    facts = {"Comment": "; ".join(f"{number} {name}" for number, name in enumerate(mask.classes))}
    save_png(image, path, facts=facts)
    with atomic_path(path.with_name(f"{path.stem}_confidence.png")) as work:
        Image.fromarray(mask.confidence).save(work, format="PNG")
    height, width = picture_size((photo.height, photo.width), 512)
    small = photo.resize((width, height), Image.Resampling.LANCZOS)
    colours = image.convert("RGB").resize((width, height), Image.Resampling.NEAREST)
    confidence = Image.fromarray(mask.confidence).convert("RGB").resize((width, height))
    names = ", ".join(mask.classes)
    pictures = [
        Picture(image=Image.blend(small, colours, 0.6), title=f"classes: {names}"),
        Picture(image=confidence, title="confidence: black 0, white 1"),
    ]
    marked = _marked(small, clicks, width / photo.width, mask.classes)
    caption = ("clicks" if clicks else "", "")
    sheet = draw_sheet([Row(photo=marked, caption=caption, pictures=pictures)], heading=heading)
    save_png(sheet, path.with_name(f"{path.stem}_sheet.png"), facts=facts)


def _palette(count: int) -> list[tuple[int, int, int]]:
    return [COLOURS[number % len(COLOURS)] for number in range(count)]


def _marked(photo: Image.Image, clicks: Clicks | None, scale: float, classes: tuple[str, ...]) -> Image.Image:
    marked = photo.copy()
    draw = ImageDraw.Draw(marked)
    for name, points in clicks.shapes if clicks else ():
        colour = COLOURS[classes.index(name) % len(COLOURS)]
        if len(points) > 1:
            draw.polygon([tuple(point) for point in (points * scale).tolist()], outline=colour, width=3)
            continue
        x, y = (points[0] + 0.5) * scale
        draw.ellipse((x - 7, y - 7, x + 7, y + 7), fill=colour, outline=(255, 255, 255), width=2)
    return marked
