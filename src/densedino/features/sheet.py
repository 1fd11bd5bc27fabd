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

    Font = ImageFont.ImageFont | ImageFont.FreeTypeFont

__all__ = ["Row", "draw_sheet", "save_png", "wrap"]

_NARROW = 16  # letters' heights that a caption needs in width, however narrow the picture
_INK, _PAPER, _FAINT, _ALARM = (24, 24, 28), (255, 255, 255), (110, 110, 118), (196, 30, 30)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One image of the sheet."""

    photo: Image.Image
    """RGB, of the size of the pictures."""
    caption: tuple[str, str]
    """Two lines under the photo."""
    pictures: Sequence[Picture]


def draw_sheet(rows: Sequence[Row], *, heading: str, alarm: str = "") -> Image.Image:
    """Draw one line of panels per row: the photograph, then its pictures; a patch asked about is framed on both.

    Args:
        rows: at least one; all with as many pictures.
        heading: what stands on top.
        alarm: what must not be overlooked, on top in red.
    """
    letter = min(24, max(13, rows[0].photo.width // 34))
    font = ImageFont.load_default(size=letter)
    line, margin = letter * 4 // 3, letter
    cells = [[(row.photo, None), *((picture.image, picture) for picture in row.pictures)] for row in rows]
    widths = [max(_NARROW * letter, *(panels[i][0].width for panels in cells)) for i in range(len(cells[0]))]
    width = sum(widths) + margin * (len(widths) + 1)
    heads, alarms = (wrap(text, font, width - 2 * margin) for text in (heading, alarm))
    foot = 2 * line + margin
    height = 2 * margin + line * len(heads + alarms) + sum(row.photo.height + foot for row in rows)
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    top = margin // 2
    for text in heads:
        draw.text((margin, top), text, fill=_INK, font=font)
        top += line
    for text in alarms:
        draw.rectangle((0, top, width, top + line), fill=_ALARM)
        draw.text((margin, top), text, fill=_PAPER, font=font)
        top += line
    top += margin // 2
    for row, panels in zip(rows, cells, strict=True):
        box = next((picture.box for picture in row.pictures if picture.box), None)
        left = margin
        for (image, picture), cell in zip(panels, widths, strict=True):
            sheet.paste(image, (left, top))
            if box and (picture is None or picture.box):
                _frame(draw, box, left, top, image.size)
            below = top + image.height + letter // 5
            texts = row.caption if picture is None else (picture.title, "")
            for i, text in enumerate(texts):
                ink = _INK if picture else _FAINT
                draw.text((left, below + i * line), _shorten(text, font, cell), fill=ink, font=font)
            if picture and picture.scale:
                _legend(sheet, draw, picture.scale, left, below + line, font, letter)
            left += cell + margin
        top += row.photo.height + foot
    return sheet


def _frame(
    draw: ImageDraw.ImageDraw, box: tuple[float, float, float, float], left: int, top: int, size: tuple[int, int]
) -> None:
    width, height = size
    x0, y0, x1, y1 = left + box[0] * width, top + box[1] * height, left + box[2] * width, top + box[3] * height
    line = max(2, width // 200)
    # White within black: seen on any ground.
    for grow, colour in ((2 * line, (0, 0, 0)), (line, (255, 255, 255))):
        draw.rectangle((x0 - grow, y0 - grow, x1 + grow - 1, y1 + grow - 1), outline=colour, width=line)


def _legend(
    sheet: Image.Image,
    draw: ImageDraw.ImageDraw,
    scale: tuple[float, float],
    left: int,
    top: int,
    font: Font,
    letter: int,
) -> None:
    low, high = (f"{value:.2g}" for value in scale)
    draw.text((left, top), low, fill=_INK, font=font)
    start = left + int(draw.textlength(low, font=font)) + letter // 2
    colours = heat_colours(torch.linspace(0, 1, 7 * letter)).expand(letter * 4 // 5, -1, -1)
    sheet.paste(Image.fromarray((colours * 255).round().byte().numpy()), (start, top + letter // 5))
    draw.text((start + 7 * letter + letter // 2, top), high, fill=_INK, font=font)


def _shorten(text: str, font: Font, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


def wrap(text: str, font: Font, width: int) -> list[str]:
    """The lines of `text`, broken between words so that each is at most `width` pixels wide, if its words are."""
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
