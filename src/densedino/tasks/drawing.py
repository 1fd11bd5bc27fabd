"""Owns pictures of answers: depth in colours, classes over the photograph with a legend, boxes with names."""

from __future__ import annotations

import colorsys
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from densedino.features.colours import heat_colours
from densedino.features.pictures import Picture, picture_size
from densedino.features.sheet import Row, draw_sheet

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from densedino.images.decoding import Pixels
    from densedino.tasks.boxes import Found
    from densedino.tasks.depth import DepthMap
    from densedino.tasks.masks import ClassMap

__all__ = ["PER_METRE", "boxes_sheet", "class_colours", "classes_sheet", "depth_image", "depth_sheet", "label_image"]

PER_METRE = 256
"""Grey levels of a 16-bit depth image in a metre, as in KITTI's: up to 255.99 m."""
_LONG_SIDE = 768
_LISTED = 24


def _photo(pixels: Pixels) -> Image.Image:
    """The picture, small enough for a sheet."""
    array = np.clip(pixels.array.astype(np.float32) * (255 / pixels.max_value), 0, 255).round().astype(np.uint8)
    image = Image.fromarray(array)
    height, width = picture_size((image.height, image.width), min(_LONG_SIDE, max(image.size)))
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _sheet(photo: Image.Image, picture: Picture, pixels: Pixels, heading: str, alarm: str) -> Image.Image:
    height, width = pixels.array.shape[:2]
    row = Row(photo=photo, caption=(pixels.name.strip("'"), f"{width}x{height} pixels"), pictures=[picture])
    return draw_sheet([row], heading=heading, alarm=alarm)


def depth_image(depth: DepthMap) -> Image.Image:
    """16 bits: `PER_METRE` grey levels in a metre."""
    levels = (depth.metres.numpy() * PER_METRE).round().clip(0, 65535).astype(np.uint16)
    return Image.fromarray(levels)


def depth_sheet(depth: DepthMap, pixels: Pixels, *, title: str, heading: str, alarm: str = "") -> Image.Image:
    """The photograph, and its depth in colours from its nearest to its farthest."""
    photo = _photo(pixels)
    low, high = float(depth.metres.min()), float(depth.metres.max())
    share = (depth.metres - low) / max(high - low, 1e-9)
    colours = Image.fromarray((heat_colours(share) * 255).round().byte().numpy())
    image = colours.resize(photo.size, Image.Resampling.BILINEAR)
    return _sheet(photo, Picture(image=image, title=title, scale=(low, high)), pixels, heading, alarm)


def class_colours(number: int) -> NDArray[np.uint8]:
    """[number, 3]: hues a golden angle apart, in three tones, so that neighbours in the list differ."""
    tones = ((0.62, 0.92), (0.85, 0.68), (0.45, 0.78))
    rgb = [colorsys.hsv_to_rgb(i * 0.61803398875 % 1, *tones[i % 3]) for i in range(number)]
    return (np.array(rgb) * 255).round().astype(np.uint8)


def label_image(classes: NDArray[np.uint8], names: Sequence[str]) -> Image.Image:
    """8 bits: the number of each pixel's class, in 0 … classes - 1, with a palette to look at it."""
    image = Image.fromarray(classes, mode=None).convert("L")
    image = Image.frombytes("P", image.size, image.tobytes())
    image.putpalette(class_colours(len(names)).flatten().tolist())
    return image


def classes_sheet(found: ClassMap, pixels: Pixels, *, heading: str, alarm: str = "") -> Image.Image:
    """The photograph, and its classes over it with a legend, those of most pixels first."""
    photo = _photo(pixels)
    labels = label_image(found.classes.numpy(), found.names).convert("RGB").resize(photo.size, Image.Resampling.NEAREST)
    over = Image.blend(photo, labels, 0.6)
    counts = np.bincount(found.classes.numpy().ravel(), minlength=len(found.names))
    listed = [int(i) for i in np.argsort(-counts, kind="stable") if counts[i]][:_LISTED]
    legend = [(f"{found.names[i]} {counts[i] / counts.sum():.0%}", i) for i in listed]
    image = _with_legend(over, legend, class_colours(len(found.names)))
    return _sheet(photo, Picture(image=image, title="classes"), pixels, heading, alarm)


def _with_legend(image: Image.Image, legend: Sequence[tuple[str, int]], colours: NDArray[np.uint8]) -> Image.Image:
    size = max(11, min(20, image.height // max(len(legend), 1) * 3 // 4))
    font = ImageFont.load_default(size=size)
    line = size * 4 // 3
    columns = -(-len(legend) * line // max(image.height - line, line))
    wide = round(max(font.getlength(text) for text, _ in legend)) + 3 * size
    out = Image.new("RGB", (image.width + columns * wide, image.height), (255, 255, 255))
    out.paste(image, (0, 0))
    draw = ImageDraw.Draw(out)
    rows = -(-len(legend) // columns)
    for place, (text, number) in enumerate(legend):
        left, top = image.width + size // 2 + place // rows * wide, place % rows * line
        draw.rectangle((left, top + size // 5, left + size, top + size), fill=tuple(map(int, colours[number])))
        draw.text((left + size * 3 // 2, top), text, fill=(24, 24, 28), font=font)
    return out


def boxes_sheet(found: Found, pixels: Pixels, *, heading: str, alarm: str = "") -> Image.Image:
    """The photograph, and the boxes on it with names and scores."""
    photo = _photo(pixels)
    image = photo.copy()
    draw = ImageDraw.Draw(image)
    scale = photo.width / pixels.array.shape[1]
    colours = class_colours(len(found.names))
    font = ImageFont.load_default(size=max(11, photo.width // 55))
    for box, label, score in reversed(list(zip(found.boxes, found.labels, found.scores, strict=True))):
        left, top, right, bottom = (float(v) * scale for v in box)
        colour = tuple(map(int, colours[int(label)]))
        draw.rectangle(
            (left, top, max(left, right), max(top, bottom)), outline=colour, width=max(2, photo.width // 300)
        )
        text = f"{found.names[int(label)] or int(label)} {float(score):.2f}"
        place = draw.textbbox((left, top), text, font=font)
        draw.rectangle(place, fill=colour)
        dark = 0.3 * colour[0] + 0.6 * colour[1] + 0.1 * colour[2] < 110
        draw.text((left, top), text, fill=(255, 255, 255) if dark else (0, 0, 0), font=font)
    title = f"{len(found.boxes)} objects"
    return _sheet(photo, Picture(image=image, title=title), pixels, heading, alarm)
