from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import rasterio
import torch

import densedino as dd
from densedino.cli.main import main
from densedino.errors import InputError
from densedino.geo import heights
from densedino.geo.heights import map_heights
from densedino.tasks.depth import DepthEstimator, DepthMap

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    """150 x 230 pixels of half a metre, with a corner of nodata."""
    values = np.random.default_rng(0).integers(1, 255, (3, 150, 230), dtype=np.uint8)
    values[:, :30, :40] = 0
    path = tmp_path / "scene.tif"
    with rasterio.open(
        path,
        "w",
        driver="GTiff",
        height=150,
        width=230,
        count=3,
        dtype="uint8",
        nodata=0,
        crs="EPSG:32632",
        transform=rasterio.Affine(0.5, 0, 6e5, 0, -0.5, 5e6),
    ) as file:
        file.write(values)
    return path


@pytest.fixture
def red(monkeypatch: pytest.MonkeyPatch) -> DepthEstimator:
    """A model whose heights are the red band, in windows of 64 pixels."""
    monkeypatch.setattr(heights, "_WINDOW", 64)
    monkeypatch.setattr(heights, "_AROUND", 16)
    calls: list[tuple[int, ...]] = []

    def call(self: DepthEstimator, pixels: Any) -> list[DepthMap]:
        calls.append(pixels.array.shape)
        if len(calls) == _Red.fails_at:
            raise KeyboardInterrupt
        return [DepthMap(torch.from_numpy(pixels.array[..., 0].astype(np.float32)), self._config.bins)]

    monkeypatch.setattr(DepthEstimator, "__call__", call)
    _Red.calls, _Red.fails_at = calls, 0
    return dd.load("debug_vit-chm", weights="random")


class _Red:
    calls: list[tuple[int, ...]]
    fails_at = 0


def test_metres_lie_where_they_belong(red: DepthEstimator, scene: Path, tmp_path: Path) -> None:
    done = map_heights(red, scene, output=tmp_path / "heights.tif")
    with rasterio.open(done.path) as file, rasterio.open(scene) as source:
        assert (file.crs, file.transform, file.shape) == (source.crs, source.transform, source.shape)
        got, expected = file.read(1), source.read(1).astype(np.float32)
        assert (
            file.nodata == -9999 and file.tags()["units"] == "metres" and file.descriptions == ("height above ground",)
        )
    expected[:30, :40] = -9999
    assert np.array_equal(got, expected)
    assert done.metres == (expected[expected > 0].min(), expected.max())
    assert not list(tmp_path.glob("*.parts")) and not list(tmp_path.glob(".*"))


def test_an_interrupted_run_goes_on(red: DepthEstimator, scene: Path, tmp_path: Path) -> None:
    _Red.fails_at = 7
    with pytest.raises(KeyboardInterrupt):
        map_heights(red, scene, output=tmp_path / "heights.tif")
    assert not (tmp_path / "heights.tif").exists()
    _Red.fails_at = 0
    map_heights(red, scene, output=tmp_path / "heights.tif")
    whole = len(_Red.calls)
    map_heights(red, scene, output=tmp_path / "again.tif")
    assert len(_Red.calls) - whole == whole - 1, "of the first run, only the window that failed was done again"
    with rasterio.open(tmp_path / "heights.tif") as a, rasterio.open(tmp_path / "again.tif") as b:
        assert np.array_equal(a.read(), b.read())


def test_what_is_kept_covers_each_pixel_once() -> None:
    for size in ((40, 60), (1024, 1024), (1025, 3000), (2500, 900)):
        seen = np.zeros(size, np.uint8)
        for window, kept in heights._windows(size):
            seen[kept[0] : kept[0] + kept[2], kept[1] : kept[1] + kept[3]] += 1
            assert window[0] <= kept[0] and kept[0] + kept[2] <= window[0] + window[2]
            assert window[1] <= kept[1] and kept[1] + kept[3] <= window[1] + window[3]
        assert (seen == 1).all()


def test_by_command_and_what_is_refused(scene: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--model", "debug_vit-chm", "--weights", "random", "-o", str(tmp_path / "heights.tif")]
    assert main(["depth", str(scene), *args]) == 0
    assert "heights.tif: 230x150 pixels, " in capsys.readouterr().out
    assert main(["depth", str(scene), str(scene), *args]) == 2 and "one scene gives one" in capsys.readouterr().err
    model = dd.load("debug_vit-chm", weights="random")
    with pytest.raises(InputError, match=r"a name that ends in \.tif"):
        map_heights(model, scene, output=tmp_path / "heights.png")
    with pytest.raises(InputError, match="how far things are from a camera"):
        map_heights(dd.load("debug_vit-dpt", weights="random"), scene, output=tmp_path / "x.tif")
    with rasterio.open(scene) as source:
        profile = {**source.profile, "dtype": "uint16", "count": 1}
    with rasterio.open(tmp_path / "grey.tif", "w", **profile) as file:
        file.write(np.ones((1, 150, 230), np.uint16))
    with pytest.raises(InputError, match="has bands of uint16"):
        map_heights(replace(model), tmp_path / "grey.tif", output=tmp_path / "x.tif")
