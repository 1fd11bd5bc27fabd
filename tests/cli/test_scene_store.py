"""Features of a scene on the way to a map: made if there are none, used if they are its own, refused if not."""

from __future__ import annotations

import numpy as np
import pytest
import rasterio

from densedino.cli.scene_store import scene_store
from densedino.errors import StoreError


def write(path, seed):
    array = np.random.default_rng(seed).integers(1, 255, (3, 64, 96), np.uint8)
    place = rasterio.Affine(1, 0, 500_000, 0, -1, 5_000_000)
    options = {"driver": "GTiff", "count": 3, "height": 64, "width": 96, "dtype": "uint8", "crs": "EPSG:32632"}
    with rasterio.open(path, "w", transform=place, **options) as file:
        file.write(array)


def test_made_once_used_again_and_another_scene_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.tif"
    write(path, 0)
    asked = {"folder": None, "model": None, "weights": None, "device": "cpu", "precision": "fp32"}
    store = scene_store(path, **asked)
    assert store.complete and store.path.name == "a_features" and "a_features" in capsys.readouterr().out
    assert scene_store(path, **asked).complete and capsys.readouterr().out == ""
    assert scene_store(store.path, **asked).grid == (4, 6)
    write(path, 1)
    with pytest.raises(StoreError, match="another scene"):
        scene_store(path, **asked)
    assert scene_store(path, **asked | {"folder": tmp_path / "other"}).complete
