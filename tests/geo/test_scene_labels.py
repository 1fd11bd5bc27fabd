"""Labels of a scene from any coordinates land on the patches they lie on."""

from __future__ import annotations

import json

import numpy as np
import pytest

from densedino.errors import InputError
from densedino.features.scenes import SceneStore
from densedino.geo.extraction import SceneOptions, extract_scene
from densedino.geo.raster import rasterio
from densedino.geo.scene_labels import read_scene_labels, tokens_at

WHERE = {"a": [(0, 0), (3, 5)], "b": [(7, 2), (4, 4), (2, 1)]}
"""(row, column) of patches."""


@pytest.fixture
def store(tiny, picture, write_raster, tmp_path):
    turned = rasterio().Affine(10, 2, 500_000, 1, -10, 5_000_000)
    path = write_raster(picture(128, 112), transform=turned)
    extract_scene(tiny, [path], output=tmp_path / "s", options=SceneOptions(tile=64, overlap=32), check=False)
    return SceneStore(tmp_path / "s")


def points(store, path, *, crs, member):
    from rasterio.warp import transform

    features = []
    for name, cells in WHERE.items():
        for row, col in cells:
            x, y = (float(axis) for axis in store.xy(row, col))
            if crs != "EPSG:32632":
                (x,), (y,) = transform("EPSG:32632", crs, [x], [y])
            features.append({"properties": {"class": name}, "geometry": {"type": "Point", "coordinates": [x, y]}})
    data = {"type": "FeatureCollection", "features": features}
    if member:
        data["crs"] = {"type": "name", "properties": {"name": member}}
    path.write_text(json.dumps(data))
    return path


@pytest.mark.parametrize(
    ("crs", "member"),
    [
        ("EPSG:32632", None),
        ("EPSG:32632", "urn:ogc:def:crs:EPSG::32632"),
        ("EPSG:4326", None),
        ("EPSG:4326", "urn:ogc:def:crs:OGC:1.3:CRS84"),
        ("EPSG:3857", "EPSG:3857"),
    ],
)
def test_points_in_any_coordinates(store, tmp_path, crs, member):
    samples = read_scene_labels(points(store, tmp_path / "p.geojson", crs=crs, member=member), store)
    found = dict(zip(map(tuple, samples.cells.tolist()), samples.shares.argmax(1).tolist(), strict=True))
    assert found == {cell: number for number, name in enumerate("ab") for cell in WHERE[name]}
    tokens, shares = tokens_at(store, samples)
    patches, _ = store.read()
    expected = {patches[cell].astype(np.float32).tobytes(): number for cell, number in found.items()}
    assert {
        token.numpy().tobytes(): int(share.argmax()) for token, share in zip(tokens, shares, strict=True)
    } == expected


def test_a_raster_on_another_grid(store, write_raster):
    x, y = (axis.reshape(-1) for axis in store.xy(*np.indices(store.grid)))
    left, top = x.min() - 500, y.max() + 500
    labels = np.full((1, 100, 110), -9, np.int16)
    for number, cells in enumerate(WHERE.values(), start=3):
        for row, col in cells:
            px, py = (float(axis) for axis in store.xy(row, col))
            labels[0, int((top - py) / 20), int((px - left) / 20)] = number
    path = write_raster(labels, "l.tif", transform=rasterio().Affine(20, 0, left, 0, -20, top), nodata=-9)
    from pathlib import Path

    samples = read_scene_labels(Path(path), store)
    assert samples.classes == ("3", "4")
    found = dict(zip(map(tuple, samples.cells.tolist()), samples.shares.argmax(1).tolist(), strict=True))
    assert found == {cell: number for number, name in enumerate("ab") for cell in WHERE[name]}


def test_labels_that_cannot_be_used_are_refused(store, write_raster, tmp_path):
    from pathlib import Path

    with pytest.raises(InputError, match="labels of 0 classes"):
        read_scene_labels(Path(write_raster(np.zeros((1, 9, 9), np.uint8), "z.tif")), store)
    with pytest.raises(InputError, match="2 bands"):
        read_scene_labels(Path(write_raster(np.ones((2, 9, 9), np.uint8), "t.tif")), store)
    with pytest.raises(InputError, match="fractions"):
        read_scene_labels(Path(write_raster(np.full((1, 9, 9), 1.5, np.float32), "h.tif")), store)
    (tmp_path / "x.tif").write_text("no raster")
    with pytest.raises(InputError, match="cannot be read"):
        read_scene_labels(tmp_path / "x.tif", store)
    path = points(store, tmp_path / "p.geojson", crs="EPSG:32632", member="EPSG:nonsense")
    with pytest.raises(InputError, match="not known"):
        read_scene_labels(path, store)
