from __future__ import annotations

import numpy as np
import pytest
import rasterio
from PIL import Image
from rasterio.enums import ColorInterp, Resampling

from densedino.errors import ImageError, InputError
from densedino.geo.raster import Scene, metres_per_pixel


def place(affine, col, row):
    a, b, c, d, e, f = tuple(affine)[:6]
    return a * col + b * row + c, d * col + e * row + f


def test_windows_are_what_the_file_holds(write_raster, picture) -> None:
    array = picture(100, 130)
    with Scene([write_raster(array)]) as scene:
        assert scene.size == (100, 130)
        assert scene.gsd == pytest.approx(10, rel=2e-3)
        values, valid = scene.read((20, 30, 40, 50), bands=[2, 0])
        np.testing.assert_array_equal(values, array[[2, 0], 20:60, 30:80])
        assert valid.all() and valid.shape == (40, 50)


@pytest.mark.parametrize("name", ["photo.png", "photo.jpg"])
def test_plain_pictures_are_scenes_without_coordinates(tmp_path, picture, name) -> None:
    Image.fromarray(picture(60, 70).transpose(1, 2, 0)).save(tmp_path / name)
    with Scene([tmp_path / name]) as scene:
        assert (scene.size, scene.crs, scene.gsd) == ((60, 70), None, None)
        assert place(scene.affine, 3, 5) == (3, 5)
        assert scene.read((0, 0, 60, 70), bands=[0, 1, 2])[1].all()


def test_alpha_is_a_mask(tmp_path) -> None:
    pixels = np.full((32, 48, 4), 200, np.uint8)
    pixels[:, :20, 3] = 0
    Image.fromarray(pixels).save(tmp_path / "a.png")
    with Scene([tmp_path / "a.png"]) as scene:
        valid = scene.read((0, 10, 32, 20), bands=[0, 1, 2])[1]
    assert not valid[:, :10].any() and valid[:, 10:].all()


def test_a_palette_is_turned_into_colours(tmp_path) -> None:
    image = Image.new("P", (32, 32), 1)
    image.putpalette([0, 0, 0, 10, 200, 30])
    image.save(tmp_path / "p.png")
    with Scene([tmp_path / "p.png"]) as scene:
        values, _ = scene.read((0, 0, 16, 16), bands=[0])
    assert values.shape == (3, 16, 16) and values[:, 0, 0].tolist() == [10, 200, 30]


def test_nodata_of_any_band_and_nan_are_not_valid(write_raster) -> None:
    array = np.ones((3, 32, 32), np.float32)
    array[0, 0, 0], array[1, 1, 1], array[2, 2, 2] = -9999, np.nan, np.inf
    with Scene([write_raster(array, nodata=-9999)]) as scene:
        valid = scene.read((0, 0, 32, 32), bands=[0, 1, 2])[1]
        assert np.argwhere(~valid).tolist() == [[0, 0], [1, 1], [2, 2]]
        assert scene.read((0, 0, 32, 32), bands=[2])[1].sum() == 32 * 32 - 1


def test_nodata_can_be_said_where_the_file_is_wrong(write_raster, picture) -> None:
    array = picture(32, 32).clip(1, 255)
    array[:, :16] = 0
    path = write_raster(array, nodata=77)
    with Scene([path], nodata=0) as scene:
        valid = scene.read((0, 0, 32, 32), bands=[0, 1, 2])[1]
    assert not valid[:16].any() and valid[16:].all()


def test_nodata_that_is_said_is_not_averaged_into_the_rest(write_raster) -> None:
    array = np.full((1, 64, 64), 100, np.uint8)
    array[:, :, ::3] = 0
    with Scene([write_raster(array)], nodata=0) as scene:
        values, valid = scene.read((0, 0, 64, 64), bands=[0], out=(16, 16))
    assert valid.any() and (values[0][valid] == 100).all()


def test_overviews_are_used_to_shrink(tmp_path, write_raster) -> None:
    path = write_raster(np.zeros((1, 512, 512), np.uint8), tiled=True, blockxsize=128, blockysize=128)
    with rasterio.open(path, "r+") as file:
        file.build_overviews([4], Resampling.nearest)
        file.write(np.full((1, 512, 512), 200, np.uint8))  # only the full size has changed: overviews still hold 0
    with Scene([path]) as scene:
        assert (scene.read((0, 0, 512, 512), bands=[0], out=(64, 64))[0] == 0).all()
        assert (scene.read((0, 0, 64, 64), bands=[0])[0] == 200).all()
    with Scene([path], gsd=80) as scene:
        assert scene.size == (64, 64)
        assert (scene.read((0, 0, 32, 32), bands=[0])[0] == 0).all()


@pytest.mark.parametrize("gsd", [25.0, 4.0])
def test_resampling_to_a_resolution_keeps_the_place(write_raster, gsd) -> None:
    rows, cols = np.mgrid[:200, :300].astype(np.float32)
    transform = rasterio.Affine(10, 2, 500_000, 1, -10, 5_000_000)
    with Scene([write_raster(np.stack([rows, cols]), transform=transform)], gsd=gsd) as scene:
        assert scene.gsd == pytest.approx(gsd, rel=1e-9)
        assert place(scene.affine, scene.size[1], scene.size[0]) == pytest.approx(place(transform, 300, 200))
        top, left = scene.size[0] // 3, scene.size[1] // 3
        values, _ = scene.read((top, left, 8, 8), bands=[0, 1])
        x, y = place(scene.affine, left + 4.5, top + 4.5)
        col, row = place(~transform, x, y)
        assert values[:, 4, 4] == pytest.approx([row - 0.5, col - 0.5], abs=0.3)


def test_reprojection_puts_known_ground_points_in_place(write_raster) -> None:
    rows, cols = np.mgrid[:200, :200].astype(np.float32)
    transform = rasterio.Affine(10, 0, 500_000, 0, -10, 5_000_000)
    with Scene([write_raster(np.stack([rows, cols]), transform=transform)], crs="EPSG:3857") as scene:
        middle = (scene.size[0] // 2, scene.size[1] // 2)
        values, valid = scene.read((*middle, 1, 1), bands=[0, 1])
        x, y = place(scene.affine, middle[1] + 0.5, middle[0] + 0.5)
        xs, ys = rasterio.warp.transform("EPSG:3857", "EPSG:32632", [x], [y])
        col, row = place(~transform, xs[0], ys[0])
        assert valid.all()
        assert values[:, 0, 0] == pytest.approx([row - 0.5, col - 0.5], abs=0.2)


def test_files_of_one_scene_are_put_on_the_finest_grid(write_raster) -> None:
    fine = np.mgrid[:120, :120][1][None].astype(np.float32)
    coarse = (np.mgrid[:20, :20][1][None] * 6 + 2.5).astype(np.float32)
    paths = [
        write_raster(coarse, "a_B11.tif", transform=rasterio.Affine(60, 0, 500_000, 0, -60, 5_000_000)),
        write_raster(fine, "a_B04.tif"),
    ]
    with Scene(paths) as scene:
        assert scene.size == (120, 120)
        values, valid = scene.read((40, 40, 40, 40), bands=[0, 1])
    assert valid.all()
    np.testing.assert_allclose(values[0], values[1], atol=0.6)


def test_metres_come_from_the_ground(write_raster, picture) -> None:
    degrees = rasterio.Affine(0.001, 0, 10, 0, -0.001, 60)
    with Scene([write_raster(picture(20, 20), crs="EPSG:4326", transform=degrees)]) as scene:
        assert scene.gsd == pytest.approx((111_412 * 55_800) ** 0.5 * 0.001, rel=0.01)  # metres per degree at 60° N
    crs = rasterio.CRS.from_epsg(3857)
    at_60 = rasterio.Affine(10, 0, 1_000_000, 0, -10, 8_399_738)
    assert metres_per_pixel(crs, at_60, (10, 10)) == pytest.approx(5, rel=0.01)


def damage(path: str) -> None:
    with rasterio.open(path) as file:
        offset = int(file.get_tag_item("BLOCK_OFFSET_1_1", "TIFF", bidx=1))
    with open(path, "r+b") as raw:  # noqa: PTH123
        raw.seek(offset)
        raw.write(b"\xff" * 40)


def test_a_damaged_block_is_not_valid_and_noted(write_raster, picture) -> None:
    array = picture(256, 256)
    path = write_raster(array, tiled=True, blockxsize=64, blockysize=64, compress="deflate", interleave="pixel")
    damage(path)
    with Scene([path]) as scene:
        values, valid = scene.read((0, 0, 256, 256), bands=[0, 1, 2])
        assert not valid[64:128, 64:128].any()
        assert valid.sum() == 256 * 256 - 64 * 64
        np.testing.assert_array_equal(values[:, valid], array[:, valid])
        assert scene.damaged == [(64, 64, 64, 64)]


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "the file is empty"), (b"no raster at all", "cannot be read as a raster"), (None, "there is no such file")],
)
def test_what_is_no_raster_is_named(tmp_path, content, message) -> None:
    path = tmp_path / "x.tif"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ImageError, match=message):
        Scene([path])


def test_complex_numbers_are_refused(write_raster) -> None:
    path = write_raster(np.ones((1, 20, 20), np.complex64))
    with pytest.raises(ImageError, match="complex numbers"):
        Scene([path])


def test_without_a_crs_there_are_no_metres_and_no_reprojection(write_raster, picture) -> None:
    path = write_raster(picture(32, 32), crs=None)
    with pytest.raises(InputError, match=r"has no CRS.*gsd=5"):
        Scene([path], gsd=5)
    with pytest.raises(InputError, match="has no CRS and cannot be reprojected"):
        Scene([path], crs="EPSG:4326")
    other = write_raster(picture(16, 32), "b.tif", crs=None)
    with pytest.raises(InputError, match="Without a CRS all bands need one size"):
        Scene([path, other])


@pytest.mark.parametrize(
    ("option", "message"), [({"gsd": -1}, "gsd is -1"), ({"crs": "EPSG:99"}, "crs 'EPSG:99' cannot be used")]
)
def test_options_that_make_no_sense(write_raster, picture, option, message) -> None:
    with pytest.raises(InputError, match=message):
        Scene([write_raster(picture(32, 32))], **option)


def test_bands_say_what_their_file_says(write_raster, picture) -> None:
    path = write_raster(picture(20, 20, count=4))
    with rasterio.open(path, "r+") as file:
        file.descriptions = ("B2", "B3", "B4", "")
        file.colorinterp = (ColorInterp.blue, ColorInterp.green, ColorInterp.red, ColorInterp.alpha)
        file.scales, file.offsets = (0.5,) * 4, (1.0,) * 4
        file.update_tags(1, wavelength="0.49", wavelength_units="Micrometers")
    with Scene([path]) as scene:
        first, last = scene.bands[0], scene.bands[3]
    assert (first.description, first.colour, first.scale, first.offset, first.wavelength) == ("B2", "blue", 0.5, 1, 490)
    assert (last.colour, last.wavelength, last.number) == ("alpha", None, 4)
