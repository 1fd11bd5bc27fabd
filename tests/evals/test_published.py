"""Published figures: of weights that there are, by metrics that protocols have."""

from __future__ import annotations

from densedino.evals.published import PUBLISHED, published_value
from densedino.weights.catalog import WEIGHTS


def test_names_are_those_of_the_table_of_weights() -> None:
    for column in PUBLISHED.values():
        assert set(column) <= set(WEIGHTS)


def test_a_figure_is_found_by_its_place() -> None:
    assert published_value("segmentation", "ADE20K", "vitl16-lvd1689m") == ("miou", 54.9)
    assert published_value("segmentation", "VOC", "vitl16-lvd1689m") is None
    assert published_value("segmentation", "ADE20K", "vitt16") is None
    assert published_value("retrieval", "revisited Oxford/Paris", "vitl16-lvd1689m", folder="rparis6k") is None
    assert published_value("retrieval", "revisited Oxford/Paris", "vitl16-lvd1689m", folder="roxford5k") == (
        "map_hard",
        63.1,
    )
