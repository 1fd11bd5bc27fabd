"""Owns labels from few clicks: points, areas and sparse masks → a head on frozen patches → classes with confidence."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F

from densedino.errors import InputError, UnknownNameError
from densedino.features.probes import LinearProbe, fit_linear_probe

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import Tensor

__all__ = ["Clicks", "Head", "Samples", "fit_head", "mask_samples", "read_points", "samples_of"]

Head = Literal["linear", "knn"]

_FIELDS = ("class", "label", "name", "value", "id")  # where GeoJSON files keep what a point is
_NEIGHBOURS = 15
_TEMPERATURE = 0.07
_PENALTY = 1e-2  # on standardised tokens: strong enough for ten clicks, weak enough for thousands


@dataclass(frozen=True)
class Clicks:
    """Places with classes, in the coordinates of their file."""

    shapes: tuple[tuple[str, NDArray[np.float64]], ...]
    """(class, [n, 2] x and y): one row is a point, more are the corners of an area."""
    crs: str | None = None
    """Of the file, if it says; GeoJSON without one is in the coordinates of what it is about."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Sorted: numbers by value, then names."""
        names = {name for name, _ in self.shapes}
        return tuple(
            sorted(names, key=lambda name: (not _is_number(name), float(name) if _is_number(name) else 0, name))
        )


@dataclass(frozen=True)
class Samples:
    """Labelled patches."""

    cells: NDArray[np.int64]
    """[n, 2]: row and column of each on the grid; no two are the same."""
    shares: NDArray[np.float32]
    """[n, C]: how much of what is labelled in the patch is of each class."""
    classes: tuple[str, ...]


def _is_number(name: str) -> bool:
    try:
        return math.isfinite(float(name))
    except ValueError:
        return False


def read_points(path: Path, *, field: str | None = None) -> Clicks:
    """Read a GeoJSON file of points and areas (Point, MultiPoint, Polygon, MultiPolygon).

    Args:
        path: the file; x is right and y down for photographs, coordinates on the ground for scenes.
        field: the property that is the class; the first there is of class, label, name, value, id if not given.

    Raises:
        InputError: no such file, no GeoJSON, no points, or points without a class.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        features = data["features"]
    except OSError as error:
        raise InputError(f"the points {str(path)!r} cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{str(path)!r} is no GeoJSON FeatureCollection. Export points as GeoJSON.") from error
    shapes: list[tuple[str, NDArray[np.float64]]] = []
    for number, feature in enumerate(features):
        name = _class_of(feature.get("properties") or {}, field, f"feature {number} of {str(path)!r}")
        shapes += [(name, corners) for corners in _corners(feature.get("geometry") or {}, path)]
    if not shapes:
        raise InputError(f"{str(path)!r} has no points and no areas.")
    return Clicks(tuple(shapes), (data.get("crs") or {}).get("properties", {}).get("name"))


def _class_of(properties: dict[str, Any], field: str | None, where: str) -> str:
    for name in (field,) if field else _FIELDS:
        if properties.get(name) is not None:
            value = properties[name]
            return f"{value:g}" if isinstance(value, float) else str(value)
    raise InputError(
        f"{where} has no property {field or ' or '.join(_FIELDS)} to say what it is; it has: "
        f"{', '.join(properties) or 'none'}. Name the right one: --field."
    )


def _corners(geometry: dict[str, Any], path: Path) -> list[NDArray[np.float64]]:
    kind, coordinates = geometry.get("type"), geometry.get("coordinates")
    if kind == "Point":
        parts = [[coordinates]]
    elif kind == "MultiPoint":
        parts = [[point] for point in coordinates or ()]
    elif kind == "Polygon":
        parts = [(coordinates or [()])[0]]
    elif kind == "MultiPolygon":
        parts = [polygon[0] for polygon in coordinates or ()]
    else:
        raise InputError(f"{str(path)!r} has a {kind}; points and polygons can be labels, lines cannot.")
    arrays = [np.asarray(part, np.float64) for part in parts if part]
    if not all(array.ndim == 2 and array.shape[1] >= 2 and np.isfinite(array).all() for array in arrays):
        raise InputError(f"{str(path)!r} has coordinates that are no pairs of numbers.")
    return [array[:, :2] for array in arrays]


def samples_of(clicks: Clicks, *, grid: tuple[int, int], to_grid: Callable[[NDArray[np.float64]], Any]) -> Samples:
    """The patches that points lie on, and those whose centres areas cover.

    Args:
        clicks: of `read_points`.
        grid: (h, w) in patches.
        to_grid: coordinates [n, 2] (x, y) → places [n, 2] in patches (right, down) from the grid's top left corner.

    Raises:
        InputError: fewer than two classes, or nothing lies on the grid.
    """
    classes = clicks.classes
    _check_classes(classes)
    counts: dict[tuple[int, int], NDArray[np.float32]] = {}
    outside = 0
    for name, corners in clicks.shapes:
        places = np.asarray(to_grid(corners))
        cells = np.floor(places[:, ::-1]).astype(np.int64) if len(places) == 1 else _covered(places, grid)
        on = ((cells >= 0) & (cells < grid)).all(1)
        outside += int((~on).sum())
        for row, col in cells[on].tolist():
            counts.setdefault((row, col), np.zeros(len(classes), np.float32))[classes.index(name)] += 1
    if not counts:
        raise InputError(
            f"none of the {len(clicks.shapes)} points lies on the picture. Those of photographs are x,y in pixels from "
            "the top left; those of scenes are in the scene's own coordinates."
        )
    if outside:
        raise InputError(f"{outside} of {len(clicks.shapes)} points lie outside of the picture. Remove or move them.")
    table = np.stack(list(counts.values()))
    return Samples(np.array(list(counts), np.int64), table / table.sum(1, keepdims=True), classes)


def _check_classes(classes: Sequence[str]) -> None:
    if len(classes) < 2:
        raise InputError(
            f"all labels are of one class ({', '.join(classes)}); a head tells classes apart, so give points of at "
            "least two, such as foreground and background."
        )


def _covered(polygon: NDArray[np.float64], grid: tuple[int, int]) -> NDArray[np.int64]:
    """Cells [n, 2] (row, column) whose centres lie in a polygon [m, 2] (right, down), by the even-odd rule."""
    low, high = np.floor(polygon.min(0)).astype(int), np.ceil(polygon.max(0)).astype(int)
    rows = np.arange(max(low[1], 0), min(high[1], grid[0]))
    cols = np.arange(max(low[0], 0), min(high[0], grid[1]))
    y, x = (axis.reshape(-1) for axis in np.meshgrid(rows + 0.5, cols + 0.5, indexing="ij"))
    inside = np.zeros(len(x), np.bool_)
    for (x0, y0), (x1, y1) in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
        crosses = (y0 > y) != (y1 > y)
        if crosses.any():
            inside ^= crosses & (x < (x1 - x0) * (y - y0) / (y1 - y0 if y1 != y0 else 1.0) + x0)
    return np.stack([y[inside], x[inside]], 1).astype(np.int64)


def mask_samples(mask: NDArray[Any], *, grid: tuple[int, int], ignore: Sequence[int] = (0,)) -> Samples:
    """The patches that have labelled pixels, of a sparse mask [H, W] over the whole picture.

    A pixel belongs to the patch that its centre falls on, whatever the ratio of sizes.

    Args:
        mask: whole numbers; those in `ignore` mean "not labelled".
        grid: (h, w) in patches.
        ignore: by default 0.

    Raises:
        InputError: fewer than two classes.
    """
    rows = (2 * np.arange(mask.shape[0]) + 1) * grid[0] // (2 * mask.shape[0])
    cols = (2 * np.arange(mask.shape[1]) + 1) * grid[1] // (2 * mask.shape[1])
    counted = ~np.isin(mask, list(ignore))
    values, numbers = np.unique(mask[counted], return_inverse=True)
    _check_classes([str(value) for value in values])
    patch = (rows[:, None] * grid[1] + cols)[counted]
    cells, places = np.unique(patch, return_inverse=True)
    counts = np.zeros((len(cells), len(values)), np.float32)
    np.add.at(counts, (places, numbers), 1)
    where = np.stack(np.divmod(cells, grid[1]), 1)
    return Samples(where, counts / counts.sum(1, keepdims=True), tuple(str(value) for value in values))


def fit_head(tokens: Tensor, shares: Tensor, *, head: Head = "linear") -> Callable[[Tensor], Tensor]:
    """Fit a head on labelled tokens [n, D] with shares [n, C]: a function from tokens [..., D] to log-probabilities.

    "linear" is multinomial logistic regression: convex, so it depends on the data alone. "knn" is a vote of the nearest
    labelled tokens by cosine, as in DINO (arXiv 2104.14294); good where a class has several looks.

    Raises:
        UnknownNameError: no such head.
        InputError: no token.
    """
    if head not in get_args(Head):
        raise UnknownNameError("head", head, get_args(Head))
    if head == "linear":
        probe: LinearProbe = fit_linear_probe(tokens.float(), shares.float(), penalty=_PENALTY, iterations=100)[0]
        return lambda asked: F.log_softmax(asked.float() @ probe.weight + probe.bias, dim=-1)
    bank = F.normalize(tokens.float(), dim=-1)

    def vote(asked: Tensor) -> Tensor:
        flat = F.normalize(asked.float().reshape(-1, asked.shape[-1]), dim=-1)
        votes = []
        for part in flat.split(4096):
            cosines, places = (part @ bank.T).topk(min(_NEIGHBOURS, len(bank)))
            weight = F.softmax(cosines / _TEMPERATURE, dim=-1)
            votes.append((weight[..., None] * shares[places]).sum(1))
        return torch.cat(votes).clamp(min=1e-6).log().reshape(*asked.shape[:-1], -1)

    return vote
