from __future__ import annotations

import json

import numpy as np
import pyogrio
import pytest
import rasterio

from densedino.errors import InputError
from densedino.geo.vectors import Shapes, cells, write_vectors

AFFINE = [160.0, 32.0, 500_000.0, 16.0, -160.0, 5_000_000.0]


def two():
    i, j = np.array([0, 3]), np.array([0, 5])
    return Shapes(rings=cells(AFFINE, i, j), properties={"row": i, "name": ["a", "b"]})


def test_cells_have_the_grids_corners() -> None:
    ring = cells(AFFINE, np.array([3]), np.array([5]), height=2)[0]
    corners = [(3, 5), (5, 5), (5, 6), (3, 6)]
    a, b, c, d, e, f = AFFINE
    assert ring.tolist() == [[a * j + b * i + c, d * j + e * i + f] for i, j in corners]


def test_geojson_is_in_degrees_and_comes_back(tmp_path) -> None:
    write_vectors(tmp_path / "a.geojson", [two(), two()], crs="EPSG:32632", metadata={"model": "m"})
    data = json.loads((tmp_path / "a.geojson").read_text())
    assert data["densedino"] == {"model": "m", "coordinates": "degrees"}
    assert [one["properties"] for one in data["features"]] == [{"row": 0, "name": "a"}, {"row": 3, "name": "b"}] * 2
    ring = np.array(data["features"][1]["geometry"]["coordinates"][0])
    assert (ring[0] == ring[-1]).all()
    x, y = ring[:, 0], ring[:, 1]
    assert np.sum(x[:-1] * y[1:] - x[1:] * y[:-1]) > 0  # counter-clockwise
    xs, ys = rasterio.warp.transform("OGC:CRS84", "EPSG:32632", x, y)
    expected = {tuple(np.round(corner, 3)) for corner in two().rings[1]}
    assert {tuple(np.round(corner, 3)) for corner in zip(xs, ys, strict=True)} == expected


def test_geojson_without_a_crs_holds_pixels(tmp_path) -> None:
    write_vectors(tmp_path / "a.geojson", [two()], crs=None)
    data = json.loads((tmp_path / "a.geojson").read_text())
    assert data["densedino"]["coordinates"] == "pixels"
    assert [500_000.0, 5_000_000.0] in data["features"][0]["geometry"]["coordinates"][0]


def test_geopackage_is_in_the_scenes_crs(tmp_path) -> None:
    write_vectors(tmp_path / "a.gpkg", [two(), two()], crs="EPSG:32632")
    meta, _, geometry, fields = pyogrio.raw.read(tmp_path / "a.gpkg")
    assert (meta["crs"], meta["geometry_type"], len(geometry)) == ("EPSG:32632", "Polygon", 4)
    assert list(meta["fields"]) == ["row", "name"] and fields[0].tolist() == [0, 3, 0, 3]
    corners = np.frombuffer(geometry[1][13:], "<f8").reshape(-1, 2)
    np.testing.assert_array_equal(corners[:-1], two().rings[1])


def test_what_cannot_be_written_is_said_and_leaves_nothing(tmp_path) -> None:
    with pytest.raises(InputError, match=r"polygons are written to .geojson or .gpkg"):
        write_vectors(tmp_path / "a.shp", [two()], crs=None)
    empty = Shapes(rings=np.zeros((0, 4, 2)), properties={"row": np.zeros(0, int)})
    with pytest.raises(InputError, match="no polygon to write"):
        write_vectors(tmp_path / "a.gpkg", [empty], crs=None)
    assert list(tmp_path.iterdir()) == []
