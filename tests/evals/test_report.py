"""The page and its plot."""

from __future__ import annotations

from xml.etree import ElementTree

from densedino.evals.report import draw_plot, render


def some_results(*, mean: float | None = 52.5) -> dict:
    metric = {"mean": mean, "std": 1.0, "values": [51.5, 53.5], "interval": [48.0, 57.0]}
    row = {"model": "<vitt16>", "head": "linear", "seeds": 2, "metrics": {"miou": metric}}
    against = {"row": ["a", "b"], "difference": -3.0, "interval": [-4.0, -2.0]}
    return {
        "protocol": "segmentation",
        "headline": "miou",
        "rule": "as it is",
        "share": 0.05,
        "data": {"layout": "CamVid", "train": 10, "test": 5},
        "rows": [row, {**row, "model": "raw", "against_first": against}],
    }


def test_the_plot_is_svg_with_every_row() -> None:
    text = draw_plot(some_results())
    ElementTree.fromstring(text)
    assert "&lt;vitt16&gt; · linear" in text and text.count("<circle") == 6 and "52.50" in text


def test_the_page_says_figures_and_differences() -> None:
    page = render(some_results(), "<svg></svg>", files={"config.json": {"a": 1}})
    assert "52.50 ± 1.00" in page and "-3.00 [-4.00, -2.00]" in page and "5% of them" in page and "<vitt16>" not in page
    empty = some_results(mean=None)
    assert "–" in render(empty, draw_plot(empty), files={})
