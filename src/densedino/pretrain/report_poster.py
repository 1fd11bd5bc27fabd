"""Owns the report's picture: verdicts, main curves and filmstrip on one sheet, for a message or a slide."""

from __future__ import annotations

from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

from densedino.features.sheet import wrap
from densedino.pretrain.charts import HEAD, HEIGHT, WIDTH, paint

if TYPE_CHECKING:
    from collections.abc import Sequence

    from densedino.pretrain.diagnosis import Verdict
    from densedino.pretrain.report_panels import Panel
    from densedino.pretrain.run_data import Film, RunData

__all__ = ["draw_poster"]

COLUMNS, CHARTS, ROWS = 4, 12, 3
_INK, _FAINT = "#1c1e21", "#6b7177"
_DOTS = {"good": "#00845f", "unknown": "#6b7177", "watch": "#c2500a", "bad": "#b00020"}
_MARGIN, _LINE, _GAP = 48, 38, 36
_SCALE = 2

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def draw_poster(run: RunData, found: Sequence[Verdict], shown: Sequence[Panel]) -> Image.Image:
    """One sheet: the verdicts, at most twelve charts, the filmstrip."""
    title, text = (ImageFont.load_default(size=size) for size in (44, 25))
    width = COLUMNS * WIDTH * _SCALE + 2 * _MARGIN
    inner = width - 2 * _MARGIN
    lines = [
        (verdict.level if i == 0 else "", line)
        for verdict in found
        for i, line in enumerate(wrap(verdict.sentence, text, inner - 34))
    ]
    charts = [chart for panel in shown for chart in panel.charts][:CHARTS]
    head = _MARGIN + 90 + _LINE * len(lines) + _GAP
    tile = (WIDTH * _SCALE, (HEIGHT + HEAD) * _SCALE + 16)
    strip = _strip(run.film, text, inner) if run.film else None
    below = head + -(-len(charts) // COLUMNS) * tile[1] + _GAP
    sheet = Image.new("RGB", (width, below + (strip.height + _MARGIN if strip else 0)), "white")
    draw = ImageDraw.Draw(sheet)
    name = run.folder.resolve().name
    draw.text((_MARGIN, _MARGIN), f"{name}: step {run.step:,} of {run.stages[-1][2]:,}", _INK, title)
    for i, (level, line) in enumerate(lines):
        y = _MARGIN + 90 + i * _LINE
        if level:
            draw.ellipse((_MARGIN, y + 7, _MARGIN + 17, y + 24), _DOTS[level])
        draw.text((_MARGIN + 34, y), line, _INK, text)
    for i, chart in enumerate(charts):
        sheet.paste(paint(chart, scale=_SCALE), (_MARGIN + i % COLUMNS * tile[0], head + i // COLUMNS * tile[1]))
    if strip:
        sheet.paste(strip, (_MARGIN, below))
    return sheet


def _strip(film: Film, font: Font, width: int) -> Image.Image:
    """The filmstrip in `width` pixels: many images stand in two blocks, side by side."""
    blocks = 2 if len(film.photos) > ROWS else 1
    columns, rows = 1 + len(film.steps), -(-len(film.photos) // blocks)
    step = min((width - (blocks - 1) * _GAP) // (columns * blocks), 240)
    top, gap = 36, 8
    sheet = Image.new("RGB", (width, top + step * rows), "white")
    draw = ImageDraw.Draw(sheet)
    for block in range(blocks):
        left = block * (columns * step + _GAP)
        for column, label in enumerate(["image", *(f"{number:,}" for number in film.steps)]):
            draw.text((left + column * step, 0), label, _FAINT, font)
        for row in range(block * rows, min((block + 1) * rows, len(film.photos))):
            for column, image in enumerate([film.photos[row], *film.frames[row]]):
                cell = image.resize((step - gap, step - gap), Image.Resampling.BICUBIC)
                sheet.paste(cell, (left + column * step, top + (row - block * rows) * step))
    return sheet
