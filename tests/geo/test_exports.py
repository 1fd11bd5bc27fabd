from __future__ import annotations

import json

import numpy as np
import pyogrio
import pytest
import rasterio
import xarray

from densedino.errors import InputError, StoreError
from densedino.features.scene_sink import SceneSink
from densedino.features.scenes import SceneStore
from densedino.geo.exports import export_scene
from densedino.geo.extraction import SceneJob, SceneOptions, extract_scene

OPTIONS = SceneOptions(tile=128, overlap=32)
STRAIGHT = rasterio.Affine(10, 0, 500_000, 0, -10, 5_000_000)
ROTATED = rasterio.Affine(10, 2, 500_000, 1, -10, 5_000_000)


@pytest.fixture(scope="module", params=["straight", "rotated", "pixels"])
def store(request, tiny, picture, tmp_path_factory):
    """Of a scene of an odd size, with nothing in its left part."""
    folder = tmp_path_factory.mktemp("scene")
    array = picture(203, 311).clip(1, 255)
    array[:, :, :40] = 0
    crs = None if request.param == "pixels" else "EPSG:32632"
    transform = {"straight": STRAIGHT, "rotated": ROTATED, "pixels": None}[request.param]
    options = {"driver": "GTiff", "dtype": "uint8", "count": 3, "height": 203, "width": 311, "nodata": 0}
    with (
        pytest.warns(rasterio.errors.NotGeoreferencedWarning) if crs is None else rasterio.Env(),
        rasterio.open(folder / "a.tif", "w", crs=crs, transform=transform, **options) as file,
    ):
        file.write(array)
    extract_scene(tiny, [folder / "a.tif"], output=folder / "out", options=OPTIONS, check=False)
    return SceneStore(folder / "out")


def open_quietly(path):
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        return rasterio.open(path)


def test_a_cog_has_a_pixel_per_patch_in_its_place(store, tmp_path) -> None:
    with open_quietly(export_scene(store, tmp_path / "a.tif")) as file:
        assert file.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        assert file.shape == store.grid and file.dtypes == ("uint8",) * 4
        assert [band.name for band in file.colorinterp] == ["red", "green", "blue", "alpha"]
        assert file.xy(7, 11) == pytest.approx(store.xy(7, 11), abs=1e-6)
        np.testing.assert_array_equal(file.read(4) == 255, store.read()[1])
        assert file.descriptions[:3] == ("red", "green", "blue")
        assert json.loads(file.tags()["DENSEDINO"])["fingerprint"] == store.metadata["fingerprint"]


def test_channels_of_a_cog_are_the_features(store, tmp_path) -> None:
    patches, valid = store.read()
    with open_quietly(export_scene(store, tmp_path / "a.tif", channels="5,0")) as file:
        values = file.read()
        assert file.descriptions == ("feature 5", "feature 0")
    np.testing.assert_array_equal(values[:, valid], patches[valid][:, [5, 0]].T.astype(np.float32))
    assert np.isnan(values[:, ~valid]).all()


def test_components_are_whitened_and_apart(store, tmp_path) -> None:
    with open_quietly(export_scene(store, tmp_path / "a.tif", channels="pca:5")) as file:
        values = file.read()[:, store.read()[1]]
    assert len(values) == 5
    np.testing.assert_allclose(np.cov(values, bias=True), np.eye(5), atol=0.05)


def test_zarr_is_read_by_xarray_with_coordinates(store, tmp_path) -> None:
    export_scene(store, tmp_path / "a.zarr")
    assert json.loads((tmp_path / "a.zarr" / "zarr.json").read_text())["zarr_format"] == 3
    patches, valid = store.read()
    with xarray.open_zarr(tmp_path / "a.zarr") as scene:
        assert scene.patches.dims == ("y", "x", "channel")
        np.testing.assert_array_equal(scene.patches.values, patches)
        np.testing.assert_array_equal(scene.valid.values, valid)
        x, y = store.xy(7, 11)
        if "xc" in scene.coords:
            assert (float(scene.xc[7, 11]), float(scene.yc[7, 11])) == (x, y)
        else:
            assert (float(scene.x[11]), float(scene.y[7])) == (x, y)
        numbers = [float(value) for value in scene.spatial_ref.attrs["GeoTransform"].split()]
        assert rasterio.Affine.from_gdal(*numbers) == rasterio.Affine(*store.affine)
        if store.crs:
            assert rasterio.CRS.from_wkt(scene.spatial_ref.attrs["crs_wkt"]) == rasterio.CRS.from_wkt(store.crs)


def test_polygons_are_the_valid_patches(store, tmp_path) -> None:
    _, valid = store.read()
    data = json.loads(export_scene(store, tmp_path / "a.geojson").read_text())
    assert len(data["features"]) == valid.sum()
    one = next(f for f in data["features"] if (f["properties"]["row"], f["properties"]["col"]) == (7, 11))
    centre = np.mean(one["geometry"]["coordinates"][0][:4], axis=0)
    if store.crs:
        xs, ys = rasterio.warp.transform("OGC:CRS84", store.crs, [centre[0]], [centre[1]])
        centre = (xs[0], ys[0])
    assert centre == pytest.approx(store.xy(7, 11), abs=1e-2)
    info = pyogrio.read_info(export_scene(store, tmp_path / "a.gpkg"))
    assert info["features"] == valid.sum() and list(info["fields"]) == ["row", "col", "colour"]


@pytest.mark.parametrize(
    ("name", "channels", "message"),
    [
        ("a.png", "pca", "a scene is written to .zarr"),
        ("a.tif", "pca:99", "1 to 32 components"),
        ("a.tif", "32", "numbered 0 to 31"),
        ("a.tif", "all", "give pca, pca:8"),
    ],
)
def test_what_cannot_be_written_is_said(store, tmp_path, name, channels, message) -> None:
    with pytest.raises(InputError, match=message):
        export_scene(store, tmp_path / name, channels=channels)
    assert list(tmp_path.iterdir()) == []


def test_somebodys_zarr_is_left_alone(store, tmp_path) -> None:
    import zarr

    zarr.create_group(tmp_path / "a.zarr")
    with pytest.raises(StoreError, match="densedino did not write it"):
        export_scene(store, tmp_path / "a.zarr")
    export_scene(store, tmp_path / "b.zarr")
    export_scene(store, tmp_path / "b.zarr")


def test_a_store_that_is_not_complete_is_refused(tiny, write_raster, picture, tmp_path) -> None:
    with SceneJob(tiny, [write_raster(picture(300, 200))], OPTIONS) as job:
        SceneSink(tmp_path / "part", job.metadata)
    with pytest.raises(StoreError, match="is not complete"):
        export_scene(SceneStore(tmp_path / "part"), tmp_path / "a.tif")
