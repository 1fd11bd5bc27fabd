"""Owns vector files with coordinates: polygons with properties out, as GeoJSON or GeoPackage, piece by piece."""

from __future__ import annotations

import json
import struct
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from densedino.checkpoint import atomic_path
from densedino.errors import InputError, require
from densedino.geo.raster import rasterio

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Mapping, Sequence

    from numpy.typing import NDArray

__all__ = ["Shapes", "cells", "write_vectors"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Shapes:
    """Polygons of one number of corners, with properties."""

    rings: NDArray[np.float64]
    """[n, k, 2] corners (x, y) in the order around; the first is not repeated."""
    properties: Mapping[str, Sequence[Any] | NDArray[Any]]
    """Per name, n values."""


def cells(
    affine: Sequence[float], i: NDArray[Any], j: NDArray[Any], *, height: int = 1, width: int = 1
) -> NDArray[Any]:
    """Corners [n, 4, 2] of cells of a grid: rows i to i + height, columns j to j + width.

    `affine` is that of the grid: x = a·col + b·row + c, y = d·col + e·row + f.
    """
    a, b, c, d, e, f = affine
    rows = i[:, None] + np.array([0, height, height, 0], np.float64)
    cols = j[:, None] + np.array([0, 0, width, width], np.float64)
    return np.stack([a * cols + b * rows + c, d * cols + e * rows + f], axis=-1)


def write_vectors(
    path: str | os.PathLike[str],
    shapes: Iterable[Shapes],
    *,
    crs: str | None,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write polygons to a .geojson or .gpkg file, which is there when it is whole.

    GeoJSON is in longitude and latitude (RFC 7946), to the last digit; GeoPackage is in `crs`. Without a CRS both hold
    pixels.

    Args:
        path: replaced if it exists.
        shapes: pieces, all with the same properties.
        crs: of the corners, WKT or "EPSG:…".
        metadata: for GeoJSON, in the member "densedino".

    Raises:
        InputError: another suffix.
        MissingExtraError: pyogrio is not installed, which GeoPackage needs.
    """
    path = Path(path)
    writers = {".geojson": _write_geojson, ".json": _write_geojson, ".gpkg": _write_geopackage}
    if path.suffix.lower() not in writers:
        raise InputError(f"{str(path)!r}: polygons are written to .geojson or .gpkg.")
    with atomic_path(path) as scratch:
        writers[path.suffix.lower()](scratch, shapes, crs, metadata or {})


def _write_geojson(path: Path, shapes: Iterable[Shapes], crs: str | None, metadata: Mapping[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write('{"type": "FeatureCollection",\n')
        file.write(f'"densedino": {json.dumps({**metadata, "coordinates": "degrees" if crs else "pixels"})},\n')
        file.write('"features": [\n')
        comma = ""
        for part in shapes:
            rings = _to_degrees(part.rings, crs)
            if len(rings) and _area_sign(rings[0]) < 0:
                rings = rings[:, ::-1]  # the right-hand rule of RFC 7946
            for n, properties in enumerate(_rows(part)):
                ring = rings[n].tolist()
                geometry = {"type": "Polygon", "coordinates": [[*ring, ring[0]]]}
                feature = {"type": "Feature", "properties": properties, "geometry": geometry}
                file.write(comma + json.dumps(feature))
                comma = ",\n"
        file.write("\n]}\n")


def _to_degrees(rings: NDArray[np.float64], crs: str | None) -> NDArray[np.float64]:
    if crs is None or not len(rings):
        return rings
    flat = rings.reshape(-1, 2)
    lon, lat = rasterio().warp.transform(crs, "OGC:CRS84", flat[:, 0], flat[:, 1])[:2]
    return np.stack([lon, lat], axis=-1).reshape(rings.shape)


def _area_sign(ring: NDArray[np.float64]) -> float:
    x, y = ring.T
    return float(np.sum(x * np.roll(y, -1) - np.roll(x, -1) * y))


def _rows(part: Shapes) -> list[dict[str, Any]]:
    columns = {name: values.tolist() if isinstance(values, np.ndarray) else values for name, values in _columns(part)}
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _columns(part: Shapes) -> Iterable[tuple[str, Any]]:
    return part.properties.items()


def _write_geopackage(path: Path, shapes: Iterable[Shapes], crs: str | None, metadata: Mapping[str, Any]) -> None:
    pyogrio = require("pyogrio", extra="geo", purpose="writing GeoPackage files")
    from pyogrio import raw

    written = False
    for part in shapes:
        if not len(part.rings):
            continue
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "'crs' was not provided")  # such scenes are in pixels
            raw.write(
                path,
                geometry=np.array([_wkb(ring) for ring in part.rings], dtype=object),
                field_data=[np.asarray(values) for values in part.properties.values()],
                fields=list(part.properties),
                crs=crs,
                geometry_type="Polygon",
                driver="GPKG",
                layer="densedino",
                append=written,
            )
        written = True
    if not written:
        raise InputError(
            f"{path.name}: there is no polygon to write: no patch is valid (pyogrio {pyogrio.__version__})."
        )


def _wkb(ring: NDArray[np.float64]) -> bytes:
    """Well-known binary of a polygon (OGC 06-103r4): little-endian, type 3, one ring, closed."""
    closed = np.concatenate([ring, ring[:1]]).astype("<f8")
    return struct.pack("<BIII", 1, 3, 1, len(closed)) + closed.tobytes()
