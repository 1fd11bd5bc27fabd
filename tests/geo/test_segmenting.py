"""A scene from few labels: the map is right where nobody labelled, in the scene's place, with confidence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from skimage import data

import densedino as dd
from densedino.errors import StoreError
from densedino.features.scenes import SceneStore
from densedino.geo.extraction import SceneOptions, extract_scene
from densedino.geo.raster import rasterio
from densedino.geo.segmenting import segment_scene


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """Fur on the left, table on the right, nothing in the lower 64 rows; 320 × 384 pixels."""
    folder = tmp_path_factory.mktemp("scene")
    fur, table = data.chelsea()[60:252, 100:292], data.coffee()[:192, 380:572]
    array = np.zeros((320, 384, 3), np.uint8)
    array[:192, :192], array[192:256, :192] = fur, fur[:64]
    array[:192, 192:], array[192:256, 192:] = table, table[:64]
    array[:256] = array[:256].clip(1)
    module = rasterio()
    place = module.Affine(0.5, 0, 500_000, 0, -0.5, 5_000_000)
    options = {"driver": "GTiff", "height": 320, "width": 384, "crs": "EPSG:32632", "transform": place}
    with module.open(folder / "s.tif", "w", count=3, dtype="uint8", nodata=0, **options) as file:
        file.write(array.transpose(2, 0, 1))
    labels = np.zeros((1, 320, 384), np.uint8)
    labels[0, [40, 100, 200], [50, 100, 30]] = 7
    labels[0, [30, 120, 220], [240, 300, 350]] = 9
    with module.open(folder / "l.tif", "w", count=1, dtype="uint8", **options) as file:
        file.write(labels)
    extract_scene(
        dd.load(), [folder / "s.tif"], output=folder / "f", options=SceneOptions(tile=128, overlap=64), check=False
    )
    return folder


@pytest.mark.parametrize("per_patch", [False, True])
def test_a_map_with_confidence(scene, tmp_path, per_patch):
    seen, rows = [], []
    result = segment_scene(
        SceneStore(scene / "f"),
        scene / "l.tif",
        output=tmp_path / "m.tif",
        per_patch=per_patch,
        fitted=lambda *what: seen.append(what[:2]),
        advance=rows.append,
    )
    assert seen == [(("7", "9"), 6)] and sum(rows) == 20 and result.patches == 6
    with rasterio().open(tmp_path / "m.tif") as file:
        number, confidence = file.read()
        assert file.descriptions == ("class", "confidence") and file.tags()["CLASS_1"] == "7"
        assert file.bounds == (500_000, 5_000_000 - 160, 500_000 + 192, 5_000_000)
        assert file.colormap(1)[1][:3] != file.colormap(1)[2][:3]
    step = 16 if per_patch else 1
    assert not number[256 // step :].any() and (number[: 256 // step] > 0).all()
    left, right = number[: 256 // step, : 176 // step], number[: 256 // step, 208 // step :]
    assert (left == 1).mean() > 0.75 and (right == 2).mean() > 0.75
    assert confidence[number > 0].min() >= 127 and abs(confidence[number > 0].mean() / 255 - result.confidence) < 1e-6
    assert result.shares == pytest.approx([(number == i).sum() / (number > 0).sum() for i in (1, 2)])


def test_an_incomplete_store_is_refused(scene, tmp_path):
    store = SceneStore(scene / "f")
    store._rows.popitem()
    with pytest.raises(StoreError, match="not complete"):
        segment_scene(store, Path("l.tif"), output=tmp_path / "m.tif")
