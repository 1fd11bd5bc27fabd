"""Owns labels of scenes: points, areas and label rasters in any coordinates → labelled patches of a scene's grid."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from densedino.adapters.few_clicks import Samples, read_points, samples_of
from densedino.errors import InputError
from densedino.geo.raster import gdal, rasterio

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from densedino.features.scenes import SceneStore

__all__ = ["read_scene_labels", "tokens_at"]

_ROWS = 512  # of a label raster, read at once


def read_scene_labels(path: Path, store: SceneStore, *, field: str | None = None) -> Samples:
    """The labelled patches of a scene.

    GeoJSON is in the coordinates that its `crs` names. Without one, numbers that can be longitude and latitude are
    that, as RFC 7946 has it; others are the scene's own. A raster of class numbers may have any grid and CRS; its
    nodata value means "not labelled", or 0 if it has none.

    Raises:
        InputError: no labels, or none on the scene, or fewer than two classes.
        MissingExtraError: rasterio is not installed.
    """
    if path.suffix.lower() in (".geojson", ".json"):
        clicks = read_points(path, field=field)
        crs = clicks.crs or _assumed(np.concatenate([points for _, points in clicks.shapes]), store)
        return samples_of(clicks, grid=store.grid, to_grid=lambda points: _to_grid(points, crs, store))
    return _read_raster(path, store)


def _assumed(points: NDArray[np.float64], store: SceneStore) -> str | None:
    """The CRS of points that do not name one."""
    if store.crs is None or (np.abs(points) > (180, 90)).any():
        return store.crs
    return "EPSG:4326"


def _to_grid(points: NDArray[np.float64], crs: str | None, store: SceneStore) -> NDArray[np.float64]:
    """Coordinates [n, 2] in `crs` → places [n, 2] in patches (right, down) from the grid's top left corner."""
    x, y = points.T
    if crs is not None and store.crs is not None:
        module = rasterio()
        try:
            with gdal():
                source, target = module.crs.CRS.from_user_input(crs), module.crs.CRS.from_wkt(store.crs)
                if source != target:
                    from rasterio.warp import transform

                    x, y = (np.asarray(axis) for axis in transform(source, target, x.tolist(), y.tolist()))
        except (module.errors.RasterioError, ValueError) as error:
            raise InputError(f"the labels are in coordinates {crs!r} that are not known: {error}.") from error
    elif crs is not None:
        raise InputError(f"the labels are in {crs}, but the scene has no coordinates. Give labels in its pixels.")
    a, b, c, d, e, f = store.affine
    det = a * e - b * d
    return np.stack([(e * (x - c) - b * (y - f)) / det, (a * (y - f) - d * (x - c)) / det], 1)


def _read_raster(path: Path, store: SceneStore) -> Samples:
    """Every labelled pixel counts for the patch that its centre lies on."""
    module = rasterio()
    counts: dict[int, NDArray[np.int64]] = {}
    with gdal():
        try:
            file = module.open(path)
        except module.errors.RasterioIOError as error:
            raise InputError(f"the labels {str(path)!r} cannot be read: {error}.") from error
        with file:
            if file.count != 1:
                raise InputError(f"the labels {str(path)!r} have {file.count} bands; one of class numbers is needed.")
            unlabelled = 0 if file.nodata is None else file.nodata
            crs = file.crs.to_wkt() if file.crs else store.crs
            for top in range(0, file.height, _ROWS):
                window = ((top, min(top + _ROWS, file.height)), (0, file.width))
                values = file.read(1, window=window)
                rows, cols = np.nonzero((values != unlabelled) & np.isfinite(values))
                if not len(rows):
                    continue
                if (values[rows, cols] % 1).any():
                    raise InputError(
                        f"the labels {str(path)!r} have fractions; whole numbers are needed, one per class."
                    )
                x, y = file.transform @ (cols + 0.5, rows + top + 0.5)
                places = np.floor(_to_grid(np.stack([x, y], 1), crs, store)[:, ::-1]).astype(np.int64)
                on = ((places >= 0) & (places < store.grid)).all(1)
                _count(
                    counts,
                    values[rows, cols][on].astype(np.int64),
                    places[on, 0] * store.grid[1] + places[on, 1],
                    store,
                )
    return _samples(counts, store, path)


def _count(counts: dict[int, Any], values: NDArray[Any], cells: NDArray[np.int64], store: SceneStore) -> None:
    for value in np.unique(values).tolist():
        count = counts.setdefault(value, np.zeros(store.grid[0] * store.grid[1], np.int32))
        np.add.at(count, cells[values == value], 1)


def _samples(counts: dict[int, Any], store: SceneStore, path: Path) -> Samples:
    if len(counts) < 2:
        found = ", ".join(map(str, counts)) or "none"
        raise InputError(f"{str(path)!r} has labels of {len(counts)} classes on the scene ({found}); two are needed.")
    classes = sorted(counts)
    table = np.stack([counts[value] for value in classes], 1).astype(np.float32)
    cells = np.flatnonzero(table.any(1))
    shares = table[cells] / table[cells].sum(1, keepdims=True)
    return Samples(np.stack(np.divmod(cells, store.grid[1]), 1), shares, tuple(str(value) for value in classes))


def tokens_at(store: SceneStore, samples: Samples) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [n, D] and shares [n, C] of the samples that the store has; patches of nodata are left out.

    Raises:
        InputError: none of them is there.
    """
    low, high = samples.cells.min(0), samples.cells.max(0) + 1
    tokens, shares = [], []
    for block in store.blocks(rows=(int(low[0]), int(high[0])), cols=(int(low[1]), int(high[1]))):
        inside = ((samples.cells >= block.origin) & (samples.cells < np.add(block.origin, block.valid.shape))).all(1)
        cells = samples.cells[inside] - block.origin
        there = block.patches[cells[:, 0], cells[:, 1]]
        real = block.valid[cells[:, 0], cells[:, 1]]
        tokens.append(there[real].astype(np.float32))
        shares.append(samples.shares[inside][real])
    if not tokens or not sum(len(part) for part in tokens):
        raise InputError("all labels lie where the scene has no data.")
    return torch.from_numpy(np.concatenate(tokens)), torch.from_numpy(np.concatenate(shares))
