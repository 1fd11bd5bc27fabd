"""Owns the recipes of the released models' published table: a plan for each of its cells that we can measure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from densedino.errors import UnknownNameError
from densedino.evals.backbones import View
from densedino.evals.plan import Plan

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["COLUMNS", "published_cell"]

COLUMNS: dict[str, tuple[str, View]] = {
    "ade20k": ("segmentation", View(resize=512, window=512, window_stride=341)),
    "nyu": ("depth", View(resize=(480, 640))),
    "davis": ("tracking", View(resize=480)),
    "spair": ("keypoints", View(resize=(512, 512))),
    "oxford": ("retrieval", View(resize=512)),
}
"""Column → the protocol, and how the backbone sees images. Sizes of the last three are ours: none were published."""


def published_cell(column: str, model: str, *, data: Path, output: Path, weights: Path | None = None) -> Plan:
    """The plan of one cell: `results.json` and the report put the published figure beside ours.

    Our probes are solved on stored features, without changing images, so that segmentation and depth come out somewhat
    lower than by the released schedule.

    Args:
        column: of `COLUMNS`.
        model: an architecture or weights by name: "vits16".
        data: the data set as it lies on disk.
        output: of the run.
        weights: the released file, if it is not in the cache.

    Raises:
        UnknownNameError: no such column.
    """
    if column not in COLUMNS:
        raise UnknownNameError("column", column, COLUMNS)
    protocol, view = COLUMNS[column]
    name = f"{model}:{weights}" if weights else model
    return Plan(protocol=protocol, data=data, models=(name,), output=output, view=view, resize=view.resize)
