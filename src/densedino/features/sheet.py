"""Owns the sheet: photographs and pictures of their features side by side, with captions, legends and provenance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from densedino.checkpoint import atomic_path
from densedino.features.colours import heat_colours

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    from densedino.features.pictures import Picture

__all__ = ["Row", "draw_sheet", "save_png"]

_MARGIN = 14
_LINE = 20
_NARROW = 230  # pixels a caption needs, however narrow the picture
_INK, _PAPER, _FAINT, _ALARM = (24, 24, 28), (255, 255, 255), (110, 110, 118), (196, 30, 30)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One image of the sheet."""

    photo: Image.Image
    """RGB, of the size of the pictures."""
    caption: str
    pictures: Sequence[Picture]


def draw_sheet(rows: Sequence[Row], *, heading: str, alarm: str = "") -> Image.Image:
    """Draw one line of panels per row: the photograph, then its pictures; a patch asked about is framed on both.

    Args:
        rows: at least one; all with as many pictures.
        heading: what stands on top.
        alarm: what must not be overlooked, on top in red.
    """
    font = ImageFont.load_default(size=15)
    cells = [[(row.photo, None), *((picture.image, picture) for picture in row.pictures)] for row in rows]
    widths = [max(_NARROW, *(panels[i][0].width for panels in cells)) for i in range(len(cells[0]))]
    width = sum(widths) + _MARGIN * (len(widths) + 1)
    heads, alarms = (_wrap(text, font, width - 2 * _MARGIN) for text in (heading, alarm))
    foot = 2 * _LINE + _MARGIN
    height = _MARGIN + _LINE * len(heads + alarms) + sum(row.photo.height + foot for row in rows) + _MARGIN
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    top = _MARGIN // 2
    for line in heads:
        draw.text((_MARGIN, top), line, fill=_INK, font=font)
        top += _LINE
    for line in alarms:
        draw.rectangle((0, top, width, top + _LINE), fill=_ALARM)
        draw.text((_MARGIN, top), line, fill=_PAPER, font=font)
        top += _LINE
    top += _MARGIN // 2
    for row, panels in zip(rows, cells, strict=True):
        box = next((picture.box for picture in row.pictures if picture.box), None)
        left = _MARGIN
        for (image, picture), cell in zip(panels, widths, strict=True):
            sheet.paste(image, (left, top))
            if box and (picture is None or picture.box):
                _frame(draw, box, left, top, image.size)
            below = top + image.height + 3
            text = picture.title if picture else row.caption
            draw.text((left, below), _shorten(text, font, cell), fill=_INK if picture else _FAINT, font=font)
            if picture and picture.scale:
                _legend(sheet, draw, picture.scale, left, below + _LINE, font)
            left += cell + _MARGIN
        top += row.photo.height + foot
    return sheet


def _frame(
    draw: ImageDraw.ImageDraw, box: tuple[float, float, float, float], left: int, top: int, size: tuple[int, int]
) -> None:
    width, height = size
    x0, y0, x1, y1 = left + box[0] * width, top + box[1] * height, left + box[2] * width, top + box[3] * height
    # White within black: seen on any ground.
    draw.rectangle((x0 - 3, y0 - 3, x1 + 2, y1 + 2), outline=(0, 0, 0), width=5)
    draw.rectangle((x0 - 2, y0 - 2, x1 + 1, y1 + 1), outline=(255, 255, 255), width=3)


def _legend(
    sheet: Image.Image,
    draw: ImageDraw.ImageDraw,
    scale: tuple[float, float],
    left: int,
    top: int,
    font: ImageFont.ImageFont | ImageFont.FreeTypeFont,
) -> None:
    low, high = (f"{value:.2g}" for value in scale)
    draw.text((left, top), low, fill=_INK, font=font)
    start = left + int(draw.textlength(low, font=font)) + 6
    colours = heat_colours(torch.linspace(0, 1, 100)).expand(12, -1, -1)
    sheet.paste(Image.fromarray((colours * 255).round().byte().numpy()), (start, top + 3))
    draw.text((start + 106, top), high, fill=_INK, font=font)


def _shorten(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


def _wrap(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def save_png(image: Image.Image, path: str | os.PathLike[str], *, facts: Mapping[str, str]) -> None:
    """Write `image` to `path` whole or not at all, with `facts` as the PNG's text chunks."""
    info = PngInfo()
    for key, value in facts.items():
        info.add_itxt(key, value)
    with atomic_path(path) as work:
        image.save(work, format="PNG", pnginfo=info)
