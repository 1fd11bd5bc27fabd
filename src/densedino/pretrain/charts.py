"""Owns small line charts: from series of numbers to marks on a plane, and from marks to SVG or to pixels.

A chart is laid out once, so that the page and the picture show the same. It has no legend: each line is labelled at its
end, in its colour. Its colours (after Okabe and Ito) are told apart with any colour vision.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, Literal

from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Chart", "Series", "paint", "short_number", "svg", "ticks"]

WIDTH, HEIGHT = 340, 190
HEAD = 34
"""Height of the title in a picture; on a page it is text."""
_LEFT, _TOP, _BOTTOM = 44, 10, 22
POINTS = 160
"""A line has at most so many points: more are averaged, and the range of what was averaged is shaded."""

LEAST_SPAN = 0.01
"""Of values, what an axis spans at least."""

PALETTE = ("#0072b2", "#c2500a", "#00845f", "#a8508a", "#8a6d00", "#5b6770")
_PAPER = {"ink": "#1c1e21", "faint": "#6b7177", "grid": "#e3e5e8", "ground": "#ffffff"}
Colour = str
"""A name: "ink", "faint", "grid", or "c0" to "c5" of the palette."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line: values by step. Values that are not finite leave a gap."""

    label: str
    steps: Sequence[float]
    values: Sequence[float]


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Lines over the steps of a run."""

    title: str
    note: str = ""
    """What is good, in a few words."""
    series: Sequence[Series] = ()
    span: tuple[float, float] = (0, 1)
    """First and last step of the axis."""
    stages: Sequence[float] = ()
    """Steps at which a stage begins, drawn as lines."""
    marked: float | None = None
    """A step to mark: the reference."""
    floor: float | None = None
    """A value that the axis must show, such as 0."""
    log: bool = False
    dots: bool = False
    """Mark every point: there are few, and each was measured."""


@dataclass(frozen=True)
class _Line:
    points: list[tuple[float, float]]
    colour: Colour
    width: float = 1.0
    dash: bool = False


@dataclass(frozen=True)
class _Area:
    points: list[tuple[float, float]]
    colour: Colour


@dataclass(frozen=True)
class _Dot:
    x: float
    y: float
    colour: Colour


@dataclass(frozen=True)
class _Text:
    x: float
    y: float
    text: str
    colour: Colour = "faint"
    anchor: Literal["start", "middle", "end"] = "start"
    bold: bool = False


_Mark = _Line | _Area | _Dot | _Text


@dataclass
class _Bins:
    """A series with at most `POINTS` points."""

    steps: list[float] = field(default_factory=list)
    mean: list[float] = field(default_factory=list)
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)


def short_number(value: float, *, exact: bool = False) -> str:
    """Three digits at most, and a letter: 0.052, 12.5, 340, 12k, 1.2M, 3e-06. `exact` keeps zeros: 6.00."""
    if exact and 0.1 <= abs(value) < 1000:
        return f"{value:#.3g}".rstrip(".")
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    size = abs(value)
    if size < 1e-3:
        return f"{value:.1e}".replace(".0e", "e")
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            return f"{value / (1e3 if letter == 'k' else limit):.3g}{letter}"
    return f"{value:.0f}" if size >= 1000 else f"{value:.3g}"


def ticks(low: float, high: float, *, count: int = 4) -> list[float]:
    """Round numbers from `low` to `high`, about `count` of them."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10 ** math.floor(math.log10(raw))
    step = next((m * power for m in (1, 2, 2.5, 5) if m * power >= raw), 10 * power)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _binned(series: Series) -> _Bins:
    points = [(s, v) for s, v in zip(series.steps, series.values, strict=True) if math.isfinite(v)]
    size = math.ceil(len(points) / POINTS) or 1
    bins = _Bins()
    for start in range(0, len(points), size):
        part = points[start : start + size]
        values = [v for _, v in part]
        bins.steps.append(sum(s for s, _ in part) / len(part))
        bins.mean.append(sum(values) / len(values))
        bins.low.append(min(values))
        bins.high.append(max(values))
    return bins


def _value_range(chart: Chart, lines: Sequence[_Bins]) -> tuple[float, float]:
    values = sorted(v for bins in lines for v in bins.mean)
    if chart.floor is not None:
        values = sorted([*values, chart.floor])
    if not values:
        return (1.0, 10.0) if chart.log else (0.0, 1.0)
    low, high = values[0], values[-1]
    if chart.log:
        positive = [v for v in values if v > 0] or [1.0]
        return positive[0] / 1.1, max(high, positive[0]) * 1.1
    if high - low < LEAST_SPAN * abs(high) or high == low:  # noise is not to fill the frame
        pad = LEAST_SPAN / 2 * abs(high) or 0.5
        return (low, high + 2 * pad) if low == chart.floor else (low - pad, high + pad)
    pad = 0.06 * (high - low)
    return (low if low == chart.floor else low - pad), (high if high == chart.floor else high + pad)


def _layout(chart: Chart) -> list[_Mark]:
    lines = [_binned(series) for series in chart.series]
    low, high = _value_range(chart, lines)
    first, last = chart.span
    letters = max((len(series.label) for series in chart.series if len(chart.series) > 1), default=0)
    right, bottom = WIDTH - 48 - min(6 * letters, 60), HEIGHT - _BOTTOM

    def x_of(step: float) -> float:
        return _LEFT + (right - _LEFT) * (step - first) / max(last - first, 1e-9)

    def y_of(value: float) -> float:
        if chart.log:
            value, a, b = math.log(max(value, low)), math.log(low), math.log(high)
        else:
            a, b = low, high
        return bottom - (bottom - _TOP) * min(max((value - a) / (b - a), 0.0), 1.0)

    marks: list[_Mark] = []
    levels = _log_ticks(low, high) if chart.log else ticks(low, high)
    for tick, label in zip(levels, _labels(levels), strict=True):
        marks.append(_Line([(_LEFT, y_of(tick)), (right, y_of(tick))], "grid"))
        marks.append(_Text(_LEFT - 6, y_of(tick) + 3.5, label, anchor="end"))
    for step in ticks(first, last, count=4):
        marks.append(_Text(x_of(step), HEIGHT - 6, short_number(step), anchor="middle"))
    for step in chart.stages:
        marks.append(_Line([(x_of(step), _TOP), (x_of(step), bottom)], "faint", 0.8, dash=True))
    if chart.marked is not None:
        marks.append(_Line([(x_of(chart.marked), _TOP), (x_of(chart.marked), bottom)], "ink", 0.8))
    for i, bins in enumerate(lines):
        colour = f"c{i % len(PALETTE)}"
        points = [(x_of(s), y_of(v)) for s, v in zip(bins.steps, bins.mean, strict=True)]
        if bins.low != bins.high:
            upper = [(x_of(s), y_of(v)) for s, v in zip(bins.steps, bins.high, strict=True)]
            lower = [(x_of(s), y_of(v)) for s, v in zip(bins.steps, bins.low, strict=True)]
            marks.append(_Area(upper + lower[::-1], colour))
        marks.append(_Line(points, colour, 1.6))
        marks += [_Dot(x, y, colour) for x, y in (points if chart.dots or len(points) == 1 else points[-1:])]
    ends = [(y_of(bins.mean[-1]), i) for i, bins in enumerate(lines) if bins.mean]
    for y, i in _apart(ends, 12, _TOP + 4, bottom):
        text = short_number(lines[i].mean[-1], exact=True)
        label = chart.series[i].label if len(chart.series) > 1 else ""
        marks.append(_Text(right + 7, y + 3.5, f"{text} {label}".strip(), f"c{i % len(PALETTE)}", bold=True))
    return marks


def _labels(levels: Sequence[float]) -> list[str]:
    """Short numbers, with more digits where they would be the same."""
    labels = [short_number(level) for level in levels]
    for digits in range(4, 10):
        if len(set(labels)) == len(labels):
            break
        labels = [f"{level:.{digits}g}" for level in levels]
    return labels


def _log_ticks(low: float, high: float) -> list[float]:
    powers = [10.0**p for p in range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)]
    if len(powers) >= 2:
        return powers[:: math.ceil(len(powers) / 5)]
    return ticks(low, high, count=3)


def _apart(ends: list[tuple[float, int]], gap: float, top: float, bottom: float) -> list[tuple[float, int]]:
    """Move labels up or down until none covers another."""
    placed = sorted(ends)
    for k in range(1, len(placed)):
        placed[k] = (max(placed[k][0], placed[k - 1][0] + gap), placed[k][1])
    over = max(0.0, placed[-1][0] - bottom) if placed else 0.0
    limit = bottom
    for k in range(len(placed) - 1, -1, -1) if over else ():
        placed[k] = (max(top, min(placed[k][0], limit)), placed[k][1])
        limit = placed[k][0] - gap
    return placed


def svg(chart: Chart) -> str:
    """The chart as an SVG element; colours are the classes "ink", "faint", "grid", "c0" to "c5" of the page."""
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(chart.title)}">']
    for mark in _layout(chart):
        match mark:
            case _Line(points, colour, width, dash) if points:
                path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
                style = ' stroke-dasharray="2 3"' if dash else ""
                parts.append(f'<polyline class="l {colour}" stroke-width="{width}"{style} points="{path}"/>')
            case _Area(points, colour):
                path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
                parts.append(f'<polygon class="a {colour}" points="{path}"/>')
            case _Dot(x, y, colour):
                parts.append(f'<circle class="d {colour}" cx="{x:.1f}" cy="{y:.1f}" r="2.1"/>')
            case _Text(x, y, text, colour, anchor, bold):
                style = f"t {colour}{' b' if bold else ''}"
                parts.append(
                    f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
                )
            case _:
                pass
    return "".join([*parts, "</svg>"])


def paint(chart: Chart, *, scale: int = 2) -> Image.Image:
    """The chart with its title as a picture on white, `scale` pixels to a unit."""
    fine = 2 * scale  # drawn twice as large, since Pillow's lines have steps
    image = Image.new("RGB", (WIDTH * fine, (HEIGHT + HEAD) * fine), _PAPER["ground"])
    draw = ImageDraw.Draw(image, "RGBA")
    font, title = (ImageFont.load_default(size=size * fine) for size in (10.5, 13))
    draw.text((8 * fine, 5 * fine), chart.title, fill=_PAPER["ink"], font=title)
    draw.text((8 * fine, 20 * fine), chart.note, fill=_PAPER["faint"], font=font)

    def at(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
        return [(x * fine, (y + HEAD) * fine) for x, y in points]

    def rgb(colour: Colour) -> str:
        return _PAPER.get(colour) or PALETTE[int(colour[1:])]

    for mark in _layout(chart):
        match mark:
            case _Line(points, colour, width, dash) if len(points) > 1:
                for part in _dashes(points) if dash else [points]:
                    draw.line(at(part), fill=rgb(colour), width=max(1, round(width * fine)), joint="curve")
            case _Area(points, colour):
                draw.polygon(at(points), fill=f"{rgb(colour)}2e")
            case _Dot(x, y, colour):
                draw.circle((x * fine, (y + HEAD) * fine), 2.1 * fine, fill=rgb(colour))
            case _Text(x, y, text, colour, anchor, _):
                place = {"start": "ls", "middle": "ms", "end": "rs"}[anchor]
                draw.text((x * fine, (y + HEAD) * fine), text, fill=rgb(colour), font=font, anchor=place)
            case _:
                pass
    return image.resize((WIDTH * scale, (HEIGHT + HEAD) * scale), Image.Resampling.LANCZOS)


def _dashes(points: list[tuple[float, float]]) -> list[list[tuple[float, float]]]:
    """The straight line between the first and last point, two units of every five."""
    (x0, y0), (x1, y1) = points[0], points[-1]
    length = math.hypot(x1 - x0, y1 - y0) or 1.0
    ends = ((d / length, min(d + 2, length) / length) for d in range(0, math.ceil(length), 5))
    return [[(x0 + (x1 - x0) * t, y0 + (y1 - y0) * t) for t in pair] for pair in ends]
