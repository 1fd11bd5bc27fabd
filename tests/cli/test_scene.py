from __future__ import annotations

import numpy as np
import pytest
import rasterio

import densedino as dd
from densedino.cli.main import main

TINY = ["--model", "debug_vit", "--weights", "random"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a scene of 200 × 264 pixels."""
    monkeypatch.chdir(tmp_path)
    array = np.random.default_rng(0).integers(1, 255, (3, 25, 33), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
    options = {"driver": "GTiff", "count": 3, "height": 200, "width": 264, "dtype": "uint8", "crs": "EPSG:32632"}
    with rasterio.open("scene.tif", "w", transform=rasterio.Affine(10, 0, 5e5, 0, -10, 5e6), **options) as file:
        file.write(array)
    return tmp_path


def test_a_scene_says_what_it_is_and_where_its_features_are(here, capsys) -> None:
    assert main(["extract", "scene.tif", "--tile", "128", "--overlap", "32", "-o", "out", *TINY]) == 0
    out, err = capsys.readouterr()
    assert "scene      200×264 pixels (H×W), 10 m each; EPSG:32632" in err
    assert "bands      1, 2, 3 of generic (red, green, blue" in err
    assert "to do      6 tiles (6 in all) of 128×128 pixels; 221 patches" in err
    assert "seams      steps between patches at borders of tiles ÷ elsewhere: " in err
    assert "seam error cosine of tiles to the scene in one piece: " in err
    assert "dd.SceneStore('out')" in out
    assert dd.SceneStore("out").complete


def test_a_store_is_written_in_other_forms(here, capsys) -> None:
    assert main(["extract", "scene.tif", "--tile", "128", "--no-check", "-o", "out", *TINY]) == 0
    assert "seam error" not in capsys.readouterr().err
    assert main(["extract", "out", "-o", "map.tif", "--channels", "pca:4"]) == 0
    assert "map.tif: written from out." in capsys.readouterr().out
    with rasterio.open("map.tif") as file:
        assert file.count == 4


@pytest.mark.parametrize("output", ["out.zarr", "out.tif", "out.geojson", "out.gpkg"])
def test_the_suffix_is_enough(here, capsys, output) -> None:
    assert main(["extract", "scene.tif", "-o", output, "--no-check", *TINY]) == 0
    assert f"{output}: 13×17 patches, 192 of them valid" in capsys.readouterr().out
    assert (here / output).exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tile", "100"], "tile is 100 pixels; it must be a multiple of the patch size 16. Nearest: 96"),
        (["--tile", "128", "--resize", "64"], "--resize: not for scenes"),
        (["--bands", "nir,red,green"], "no band 'nir'"),
        (["--tile", "128", "-o", "x.tif", "--channels", "99"], "numbered 0 to 31"),
        (["--gsd", "0"], "gsd is 0"),
        (["--scale", "physical"], "no calibration"),
    ],
)
def test_wrong_options_are_one_line_and_leave_nothing(here, capsys, options, message) -> None:
    assert main(["extract", "scene.tif", *options, *TINY]) == 2
    err = capsys.readouterr().err
    assert message in err and err.startswith("densedino: error: ") and err.count("\n") == 1
    assert [item.name for item in here.iterdir()] == ["scene.tif"]


def test_a_wrong_nodata_value_that_leaves_nothing_is_told(here, capsys) -> None:
    with rasterio.open("scene.tif", "r+") as file:
        file.write(np.full((3, 200, 264), 7, np.uint8))
        file.nodata = 7
    assert main(["extract", "scene.tif", "--tile", "128", "-o", "out", *TINY]) == 1
    out = capsys.readouterr().out
    assert "13×17 patches, 0 of them valid" in out and "No patch is valid" in out and "--nodata" in out
    assert main(["extract", "scene.tif", "--tile", "128", "--nodata", "0", "--no-check", "-o", "other", *TINY]) == 0
    assert "192 of them valid" in capsys.readouterr().out


def test_damaged_places_are_told(here, capsys) -> None:
    with rasterio.open("scene.tif") as file:
        array, profile = file.read(), file.profile
    with rasterio.open(
        "bad.tif", "w", **profile | {"tiled": True, "blockxsize": 64, "blockysize": 64, "compress": "lzw"}
    ) as file:
        file.write(array)
    with rasterio.open("bad.tif") as file:
        offset = int(file.get_tag_item("BLOCK_OFFSET_1_1", "TIFF", bidx=1))
    with open("bad.tif", "r+b") as raw:  # noqa: PTH123
        raw.seek(offset)
        raw.write(b"\xff" * 30)
    assert main(["extract", "bad.tif", "--tile", "128", "--no-check", "-o", "out", *TINY]) == 0
    assert "places of the files cannot be read; their patches are not valid" in capsys.readouterr().err
    _, valid = dd.SceneStore("out").read()
    assert not valid[4:8, 4:8].any() and valid[:4, :16].all()
