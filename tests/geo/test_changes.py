"""The change map of two scenes: what is new stands out, in its place; other grids are refused."""

from __future__ import annotations

import numpy as np
import pytest
from skimage import data

import densedino as dd
from densedino.errors import InputError
from densedino.features.scenes import SceneStore
from densedino.geo.changes import change_scenes
from densedino.geo.extraction import SceneOptions, extract_scene
from densedino.geo.raster import rasterio


@pytest.fixture
def store_of(write_raster, tmp_path):
    def make(array, name, **options):
        path = write_raster(array.transpose(2, 0, 1), f"{name}.tif", **options)
        tiles = SceneOptions(tile=128, overlap=64)
        extract_scene(dd.load(), [path], output=tmp_path / name, options=tiles, check=False)
        return SceneStore(tmp_path / name)

    return make


@pytest.mark.parametrize("per_patch", [False, True])
def test_what_is_new_stands_out_where_it_is(store_of, tmp_path, per_patch):
    old = data.coffee()[:256, :256].clip(1)
    new = (old * 0.85).astype(np.uint8).clip(1)
    new[64:128, 128:192] = data.chelsea()[100:164, 150:214].clip(1)
    new[224:] = 0
    result = change_scenes(
        store_of(old, "a", nodata=0), store_of(new, "b", nodata=0), output=tmp_path / "c.tif", per_patch=per_patch
    )
    with rasterio().open(tmp_path / "c.tif") as file:
        change = file.read(1)
        assert np.isnan(file.nodata) and file.transform.c == 500_000
    step = 16 if per_patch else 1
    assert np.isnan(change[224 // step :]).all() and np.isfinite(change[: 224 // step]).all()
    there = np.zeros(change.shape, bool)
    there[80 // step : 112 // step, 144 // step : 176 // step] = True
    far = np.isfinite(change)
    far[32 // step : 160 // step, 96 // step : 224 // step] = False
    assert change[there].mean() > result.threshold > change[far].mean()
    assert result.patches == 14 * 16 and 0.02 < result.changed < 0.4


def test_another_grid_is_refused_with_what_to_do(store_of, tmp_path):
    image = data.coffee()[:64, :64]
    moved = rasterio().Affine(10, 0, 500_010, 0, -10, 5_000_000)
    a, b = store_of(image, "a"), store_of(image, "b", transform=moved)
    with pytest.raises(InputError, match=r"affine.*gdalwarp"):
        change_scenes(a, b, output=tmp_path / "c.tif")
