"""Owns the figures that were published for the released weights (their model card), to stand beside ours."""

from __future__ import annotations

__all__ = ["PUBLISHED", "published_value"]

_VITS = ("vits16", "vits16plus", "vitb16", "vitl16", "vith16plus", "vit7b16")
_CONVNEXTS = ("convnext_tiny", "convnext_small", "convnext_base", "convnext_large")


def _column(vits: tuple[float, ...], convnexts: tuple[float, ...] = ()) -> dict[str, float]:
    named = [*zip(_VITS, vits, strict=True), *(zip(_CONVNEXTS, convnexts, strict=True) if convnexts else ())]
    return {f"{model}-lvd1689m": value for model, value in named}


PUBLISHED: dict[tuple[str, str, str], dict[str, float]] = {
    ("segmentation", "ADE20K", "miou"): _column((47.0, 48.8, 51.8, 54.9, 54.8, 55.9), (42.7, 44.8, 46.3, 47.8)),
    ("depth", "NYUv2", "rmse"): _column((0.403, 0.399, 0.373, 0.352, 0.352, 0.309), (0.448, 0.432, 0.420, 0.403)),
    ("tracking", "DAVIS", "j&f"): _column((72.7, 75.5, 77.2, 79.9, 79.3, 79.7)),
    ("keypoints", "SPair-71k", "pck@0.1"): _column((50.4, 55.2, 57.2, 61.3, 56.3, 58.7)),
    ("retrieval", "revisited Oxford/Paris", "map_hard"): _column((49.5, 50.0, 58.5, 63.1, 64.5, 72.8)),
}
"""(protocol, layout, metric) → name of the weights → figure."""


def published_value(protocol: str, layout: str, weights: str, *, folder: str = "") -> tuple[str, float] | None:
    """The metric and its published figure, for weights by their name in the table; None if there is none.

    `folder` is the data set's: Oxford and Paris are laid out alike, and only Oxford was published.
    """
    if layout == "revisited Oxford/Paris" and "oxford" not in folder.lower():
        return None
    for (of, on, metric), column in PUBLISHED.items():
        if (of, on) == (protocol, layout) and weights in column:
            return metric, column[weights]
    return None
