"""`densedino segment` as a user runs it: points on a photograph, a file of points, more photographs, a scene."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import rasterio
from PIL import Image

from densedino.cli.main import main


@pytest.fixture(autouse=True)
def _folder(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("coffee.jpg", "chelsea.png"):
        Image.open(photos / name).save(tmp_path / name)


def points(path, crs=None, **places):
    features = [
        {"properties": {"class": name}, "geometry": {"type": "Point", "coordinates": place}}
        for name, many in places.items()
        for place in many
    ]
    data = {"type": "FeatureCollection", "features": features}
    if crs:
        data["crs"] = {"type": "name", "properties": {"name": crs}}
    Path(path).write_text(json.dumps(data))


def labels_of(path):
    with Image.open(path) as image:
        return np.asarray(image)


def test_foreground_and_background_of_a_photograph(capsys):
    clicks = ["--foreground", "128,60", "110,90", "--background", "10,10", "245,10", "10,160"]
    assert main(["segment", "coffee.jpg", *clicks, "--resize", "256", "-o", "m.png"]) == 0
    said = capsys.readouterr()
    assert "m.png: background" in said.out and "5 patches" in said.err
    labels = labels_of("m.png")
    assert labels.shape == (171, 256) and labels[60, 128] == 1 and labels[10, 10] == 0
    assert labels_of("m_confidence.png").shape == labels.shape
    with Image.open("m_sheet.png") as image:
        assert image.width > 1500


@pytest.mark.parametrize("head", ["linear", "knn"])
def test_a_file_of_points_and_more_photographs(head):
    points("p.geojson", cup=[[128, 60]], table=[[10, 10], [240, 160]], saucer=[[60, 100]])
    arguments = ["--points", "p.geojson", "--head", head, "--resize", "160", "-o", "out"]
    assert main(["segment", "coffee.jpg", "chelsea.png", *arguments]) == 0
    assert set(np.unique(labels_of("out/coffee_mask.png"))) == {0, 1, 2}
    assert labels_of("out/chelsea_mask.png").shape == (170, 256)


def test_a_mask_of_labels():
    labels = np.zeros((171, 256), np.uint8)
    labels[60, 128], labels[10, 10] = 4, 9
    Image.fromarray(labels).save("l.png")
    assert main(["segment", "coffee.jpg", "--points", "l.png", "--resize", "160"]) == 0
    with Image.open("coffee_mask.png") as image:
        assert image.info["Comment"] == "0 4; 1 9"


def test_a_scene_whose_features_are_made_on_the_way_and_used_again(capsys):
    array = np.asarray(Image.open("coffee.jpg")).transpose(2, 0, 1)
    place = rasterio.Affine(2, 0, 500_000, 0, -2, 5_000_000)
    options = {"driver": "GTiff", "count": 3, "height": 171, "width": 256, "dtype": "uint8", "crs": "EPSG:32632"}
    with rasterio.open("scene.tif", "w", transform=place, **options) as file:
        file.write(array)
    points("p.geojson", "EPSG:32632", cup=[[500_256, 4_999_880]], table=[[500_020, 4_999_980], [500_480, 4_999_700]])
    assert main(["segment", "scene.tif", "--points", "p.geojson", "-o", "map.tif"]) == 0
    said = capsys.readouterr()
    assert "map.tif: cup" in said.out and "scene_features" in said.out
    with rasterio.open("map.tif") as file:
        assert file.shape == (171, 256) and file.transform == place and file.crs.to_epsg() == 32632
        assert file.read(1)[60, 128] == 1 and file.read(1)[10, 10] == 2
    assert main(["segment", "scene.tif", "--points", "p.geojson", "--per-patch", "-o", "patches.tif"]) == 0
    assert "scene_features" not in capsys.readouterr().out, "features that stand are used"
    assert main(["segment", "scene_features", "--points", "p.geojson", "-o", "again.tif"]) == 0
    with rasterio.open("map.tif") as one, rasterio.open("again.tif") as other:
        np.testing.assert_array_equal(one.read(), other.read())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["coffee.jpg"], "give labels"),
        (["coffee.jpg", "--foreground", "1,1"], "at least two"),
        (["coffee.jpg", "--foreground", "1,1", "--background", "999,1"], "outside"),
        (["coffee.jpg", "--points", "none.geojson"], "none.geojson"),
        (["coffee.jpg", "--foreground", "1,1", "--background", "9,9", "-o", "m.jpg"], ".png"),
        (["scene.tif"], "--points"),
        (["a.tif", "b.tif", "--points", "p.geojson"], "one at a time"),
        (["coffee.jpg", "x/coffee.jpg", "--foreground", "1,1", "--background", "9,9"], "same name"),
    ],
)
def test_what_cannot_be_done_is_refused(arguments, message, capsys):
    assert main(["segment", *arguments]) == 2
    assert message in capsys.readouterr().err
