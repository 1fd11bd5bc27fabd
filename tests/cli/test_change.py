"""`densedino change` as a user runs it: two photographs, two scenes, and what does not go together."""

from __future__ import annotations

import numpy as np
import pytest
import rasterio
from PIL import Image

from densedino.cli.main import main


@pytest.fixture(autouse=True)
def _folder(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = Image.open(photos / "coffee.jpg").convert("RGB")
    after = before.copy()
    after.paste(Image.open(photos / "chelsea.png").convert("RGB").crop((60, 30, 140, 110)), (140, 60))
    for name, image in (("before", before), ("after", after)):
        image.save(f"{name}.png")
        place = rasterio.Affine(2, 0, 500_000, 0, -2, 5_000_000)
        options = {"driver": "GTiff", "count": 3, "height": 171, "width": 256, "dtype": "uint8", "crs": "EPSG:32632"}
        with rasterio.open(f"{name}.tif", "w", transform=place, **options) as file:
            file.write(np.asarray(image).transpose(2, 0, 1))


def test_two_photographs_as_a_sheet(capsys):
    assert main(["change", "before.png", "after.png", "--resize", "256"]) == 0
    assert "change.png: " in capsys.readouterr().out
    with Image.open("change.png") as image:
        assert image.width > 3 * 512 and image.info["Comment"].startswith("threshold ")


def test_two_scenes_as_a_geotiff(capsys):
    assert main(["change", "before.tif", "after.tif", "-o", "c.tif"]) == 0
    assert "c.tif: " in capsys.readouterr().out
    with rasterio.open("c.tif") as file:
        change = file.read(1)
        assert file.shape == (171, 256) and file.crs.to_epsg() == 32632
    assert change[80:120, 160:200].mean() > 2 * change[:100, :100].mean()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["before.png", "after.tif"], "two scenes, or two photographs"),
        (["before.png", "after.png", "-o", "c.jpg"], ".png"),
        (["before.png", "none.png"], "none.png"),
    ],
)
def test_what_does_not_go_together_is_refused(arguments, message, capsys):
    assert main(["change", *arguments]) == 2
    assert message in capsys.readouterr().err
