"""Charts: numbers in their place, in both forms."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from densedino.pretrain.charts import HEIGHT, PALETTE, POINTS, WIDTH, Chart, Series, paint, short_number, svg, ticks


def line(values: list[float], label: str = "a") -> Series:
    return Series(label=label, steps=list(range(len(values))), values=values)


def polylines(chart: Chart, colour: str) -> list[list[tuple[float, float]]]:
    found = re.findall(rf'class="l {colour}"[^>]* points="([^"]*)"', svg(chart))
    return [[(float(x), float(y)) for x, y in (pair.split(",") for pair in path.split())] for path in found]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.05234, "0.0523"),
        (12.46, "12.5"),
        (340, "340"),
        (2500, "2500"),
        (12_000, "12k"),
        (1_234_567, "1.23M"),
        (3e-6, "3e-06"),
        (-0.5, "-0.5"),
        (2e9, "2G"),
        (math.nan, "nan"),
    ],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert short_number(value) == text


def test_exact_numbers_keep_their_zeros() -> None:
    assert [short_number(v, exact=True) for v in (6.0, 107.0, 0.6, 0.0)] == ["6.00", "107", "0.600", "0"]


@given(low=st.floats(-1e6, 1e6), width=st.floats(1e-3, 1e6))
def test_ticks_are_few_even_and_within(low: float, width: float) -> None:
    found = ticks(low, low + width)
    assert 1 <= len(found) <= 6
    assert all(low - 1e-6 * width <= tick <= low + width * (1 + 1e-6) for tick in found)
    gaps = np.diff(found)
    assert len(gaps) < 2 or np.allclose(gaps, gaps[0], rtol=1e-3)


def test_a_line_rises_from_left_to_right_within_the_frame() -> None:
    chart = Chart(title="t", series=[line([0, 1, 2, 3])], span=(0, 3))
    (path,) = polylines(chart, "c0")
    xs, ys = zip(*path, strict=True)
    assert list(xs) == sorted(xs)
    assert list(ys) == sorted(ys, reverse=True)
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in path)


def test_equal_factors_are_equal_heights_on_a_logarithmic_axis() -> None:
    (path,) = polylines(Chart(title="t", series=[line([1, 10, 100])], span=(0, 2), log=True), "c0")
    heights = [y for _, y in path]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.2)


def test_long_series_are_averaged_and_their_range_is_shaded() -> None:
    values = [math.sin(i) for i in range(5000)]
    chart = Chart(title="t", series=[line(values)], span=(0, 5000))
    (path,) = polylines(chart, "c0")
    assert len(path) <= POINTS
    assert svg(chart).count('class="a c0"') == 1
    assert "polygon" not in svg(Chart(title="t", series=[line([1, 2, 3])], span=(0, 3)))


@pytest.mark.parametrize(
    "values", [[], [1.0], [2.0, 2.0, 2.0], [math.nan, math.nan], [1.0, math.nan, math.inf, 2.0], [0.0, 0.0]]
)
@pytest.mark.parametrize("log", [False, True])
def test_any_values_can_be_drawn(values: list[float], log: bool) -> None:
    chart = Chart(title="t", series=[line(values)], span=(0, 4), log=log, floor=0 if not log else None, marked=1.0)
    text = svg(chart)
    assert "nan" not in text
    assert "inf" not in text
    assert paint(chart).width == 2 * WIDTH


def test_numbers_on_an_axis_differ_and_noise_does_not_fill_it() -> None:
    def labels(chart: Chart) -> list[str]:
        found = ElementTree.fromstring(svg(chart)).iter("text")
        return [str(t.text) for t in found if t.get("text-anchor") == "end"]

    fine = labels(Chart(title="t", series=[line([0.1402, 0.1418])], span=(0, 1)))
    assert len(set(fine)) == len(fine) > 2
    (path,) = polylines(Chart(title="t", series=[line([0.5, 0.500001])], span=(0, 1)), "c0")
    assert abs(path[0][1] - path[1][1]) < 1


def test_lines_are_labelled_at_their_ends_without_covering_each_other() -> None:
    chart = Chart(
        title="t", series=[line([1, 5.0], "one"), line([2, 5.01], "two"), line([0, 0.0], "three")], span=(0, 1)
    )
    texts = {
        t.text: float(t.attrib["y"]) for t in ElementTree.fromstring(svg(chart)) if "b" in t.get("class", "").split()
    }
    assert set(texts) == {"5.00 one", "5.01 two", "0 three"}
    ys = sorted(texts.values())
    assert min(np.diff(ys)) >= 11.9


def test_titles_and_labels_are_escaped() -> None:
    chart = Chart(title="a < b", series=[line([1, 2], "<i>"), line([1, 3], "&")], span=(0, 1))
    assert "<i>" not in svg(chart)
    ElementTree.fromstring(svg(chart))


def test_the_picture_shows_the_line_in_its_colour() -> None:
    pixels = np.asarray(paint(Chart(title="t", series=[line([0, 1, 0, 1])], span=(0, 3)), scale=2)).astype(int)
    wanted = [int(PALETTE[0][i : i + 2], 16) for i in (1, 3, 5)]
    assert (np.abs(pixels - wanted).sum(-1) < 30).sum() > 300
