"""`densedino search` as a user runs it: photographs, places, files, a scene, and what cannot be asked."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from densedino.cli.main import main
from densedino.features import search


@pytest.fixture(scope="module")
def folder(photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("search")
    assert main(["extract", str(photos), "-o", str(folder / "f")]) == 0
    scene = np.asarray(Image.open(photos / "coffee.jpg").resize((256, 192)))
    Image.fromarray(scene).save(folder / "scene.png")
    arguments = ["extract", str(folder / "scene.png"), "--tile", "128", "--no-check", "-o", str(folder / "s")]
    assert main(arguments) == 0
    return folder


@pytest.fixture(autouse=True)
def _here(folder, monkeypatch):
    monkeypatch.chdir(folder)


def table(text):
    return [line.split() for line in text.splitlines() if line[:1].isdigit()]


def test_an_image_finds_itself_first(photos, capsys):
    assert main(["search", "f", "--query", str(photos / "coffee.jpg"), "--top", "3"]) == 0
    rows = table(capsys.readouterr().out)
    assert len(rows) == 3 and rows[0][0] == "1" and float(rows[0][1]) > 0.999 and rows[0][3].endswith("coffee.jpg")


def test_a_place_as_table_and_pictures(photos, capsys):
    query = ["--query", str(photos / "chelsea.png"), "--box", "80,40,32,32"]
    assert main(["search", "f", *query, "-o", "f.csv", "f.png"]) == 0
    out = capsys.readouterr().out
    with Path("f.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(table(out)) and rows[0]["key"].endswith("chelsea.png")
    x, y, width, height = (float(rows[0][name]) for name in ("x", "y", "width", "height"))
    assert x <= 96 <= x + width and y <= 56 <= y + height
    with Image.open("f.png") as image:
        assert "chelsea.png at 80,40,32,32" in image.info["Comment"]


def test_rows_of_the_store_by_key_or_number_and_negatives(capsys):
    assert main(["search", "f", "--store-row", "1", "--point", "90,60", "--threshold", "-1", "--top", "2000"]) == 0
    free = table(capsys.readouterr().out)
    negative = ["--negative", "10,10", "--threshold", "-1", "--top", "2000"]
    assert main(["search", "f", "--store-row", "1", "--point", "90,60", *negative]) == 0
    left = table(capsys.readouterr().out)
    assert len(free) == 4, "with no threshold every image is one box"
    assert left and left != free


def test_a_large_store_gets_an_index_that_says_how_good_it_is(capsys, monkeypatch, folder):
    monkeypatch.setattr(search, "SMALL", 100)
    assert main(["search", "f", "--store-row", "0", "--point", "90,60"]) == 0
    said = capsys.readouterr()
    assert "recall@10 " in said.err and "by the index" in said.err and (folder / "f" / "search" / "patches").is_dir()
    indexed = table(said.out)
    assert main(["search", "f", "--store-row", "0", "--point", "90,60", "--exact"]) == 0
    said = capsys.readouterr()
    assert "all read" in said.err and [row[2:] for row in table(said.out)] == [row[2:] for row in indexed]


def test_a_place_in_a_scene_as_geojson(capsys):
    assert main(["search", "s", "--box", "100,80,40,40", "-o", "s.geojson"]) == 0
    rows = table(capsys.readouterr().out)
    found = json.loads(Path("s.geojson").read_text())["features"]
    assert len(found) == len(rows) > 0
    assert main(["search", "s", "--query", "scene.png@100,80,40,40", "--top", "1"]) == 0
    x, y, width, height = map(float, table(capsys.readouterr().out)[0][2].split(","))
    assert x <= 120 <= x + width and y <= 100 <= y + height


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["f"], "--query"),
        (["f", "--query", "scene.png", "--store-row", "1"], "one of them"),
        (["f", "--store-row", "none.jpg"], "no key 'none.jpg'"),
        (["f", "--query", "none.jpg"], "none.jpg"),
        (["f", "--query", "scene.png", "--point", "1"], "x,y"),
        (["f", "--query", "scene.png", "--point", "999,1"], "not in the image"),
        (["f", "--query", "scene.png", "-o", "x.geojson"], ".csv"),
        (["f", "--query", "scene.png", "-o", "x.pdf"], ".geojson"),
        (["s"], "--point"),
        (["s", "--point", "9999,1"], "not in the scene"),
        (["s", "--query", "scene.png", "--by", "images"], "no images"),
        (["none", "--query", "scene.png"], "does not exist"),
        (["f", "--query", "scene.png", "--top", "0"], "at least 1"),
    ],
)
def test_what_cannot_be_asked_is_refused(arguments, message, capsys):
    assert main(["search", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_nothing_found_is_status_one(capsys):
    assert main(["search", "f", "--query", "scene.png@10,10", "--threshold", "1.1"]) == 1
    assert "lower --threshold" in capsys.readouterr().out
