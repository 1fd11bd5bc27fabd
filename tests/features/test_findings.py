"""What a search found: lines, CSV, a sheet, GeoJSON in the scene's coordinates."""

from __future__ import annotations

import csv
import json

import numpy as np
from PIL import Image

from densedino.features.findings import draw_found, lines_of, read_photo, write_csv, write_geojson
from densedino.features.search import Found

FOUND = [
    Found(key="a/x.png", source="a/x.png", score=0.9, box=(16.0, 32.0, 48.0, 16.0), patches=3),
    Found(key="b.png", source="gone.png", score=0.5, box=(0.0, 0.0, 16.0, 16.0), patches=1),
]


def test_lines_are_a_table_in_order():
    head, first, second = lines_of(FOUND)
    assert head.split() == ["rank", "score", "x,y,w,h", "image"]
    assert first.split() == ["1", "0.9000", "16,32,48,16", "a/x.png"]
    assert second.index("b.png") == first.index("a/x.png") == head.index("image")


def test_csv_says_all(tmp_path):
    write_csv(FOUND, tmp_path / "f.csv")
    with (tmp_path / "f.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["key"] for row in rows] == ["a/x.png", "b.png"]
    assert {name: rows[0][name] for name in ("rank", "x", "width", "patches")} == {
        "rank": "1",
        "x": "16.0",
        "width": "48.0",
        "patches": "3",
    }


def test_the_sheet_shows_query_and_results_with_frames_and_survives_files_that_are_gone(tmp_path):
    green = Image.new("RGB", (100, 50), (0, 128, 0))
    shown = {"a/x.png": Image.new("RGB", (100, 100), (0, 0, 200))}
    draw_found(FOUND, tmp_path / "f.png", query=(green, (10, 10, 20, 20), "it"), heading="heading", photo=shown.get)
    with Image.open(tmp_path / "f.png") as image:
        pixels, comment = np.asarray(image.convert("RGB")), image.info["Comment"]
    assert (pixels == (0, 128, 0)).all(-1).sum() > 20_000 and (pixels == (0, 0, 200)).all(-1).sum() > 40_000
    assert (pixels == (255, 196, 0)).all(-1).sum() > 200, "frames"
    assert comment == "query: it; 1: 0.900 x.png; 2: 0.500 b.png"
    assert read_photo(str(tmp_path / "none.png")) is None


class _Scene:
    stride, crs = 16, "EPSG:32632"
    affine = (160.0, 0.0, 500_000.0, 0.0, -160.0, 5_000_000.0)  # 10 m pixels


def test_geojson_has_the_boxes_on_the_ground(tmp_path):
    write_geojson(FOUND[:1], _Scene(), tmp_path / "f.geojson")
    data = json.loads((tmp_path / "f.geojson").read_text())
    (feature,) = data["features"]
    ring = np.array(feature["geometry"]["coordinates"][0])
    np.testing.assert_allclose(ring.min(0), [500_160, 5_000_000 - 480])
    np.testing.assert_allclose(ring.max(0), [500_640, 5_000_000 - 320])
    assert feature["properties"] == {"rank": 1, "score": 0.9, "patches": 3}
    import pyogrio

    assert pyogrio.read_info(tmp_path / "f.geojson")["crs"] == "EPSG:32632"
