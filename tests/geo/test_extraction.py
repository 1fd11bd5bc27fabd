from __future__ import annotations

import numpy as np
import pytest
import rasterio
import xarray

import densedino as dd
from densedino.errors import DenseDinoError, ImageError, InputError, StoreError
from densedino.features.extractor import FeatureExtractor
from densedino.features.scene_sink import SceneSink
from densedino.features.scenes import SceneStore
from densedino.geo.extraction import SceneJob, SceneOptions, extract_scene
from densedino.images.transforms import Transform
from densedino.weights.catalog import weights_record

OPTIONS = SceneOptions(tile=128, overlap=32)
ROTATED = rasterio.Affine(10, 2, 500_000, 1, -10, 5_000_000)


def run(dino, sources, output, **options):
    report = extract_scene(dino, sources, output=output, options=SceneOptions(tile=128, overlap=32, **options))
    return report, SceneStore(output)


@pytest.mark.parametrize("transform", [rasterio.Affine(10, 0, 500_000, 0, -10, 5_000_000), ROTATED])
def test_patches_lie_where_rasterio_says(tiny, write_raster, picture, tmp_path, transform) -> None:
    path = write_raster(picture(203, 311), transform=transform)
    report, store = run(tiny, [path], tmp_path / "out")
    assert store.grid == report.grid == (13, 20) and store.complete
    with rasterio.open(path) as file:
        for i, j in ((0, 0), (5, 7), (12, 19)):
            assert store.xy(i, j) == pytest.approx(file.xy(16 * i + 8, 16 * j + 8, offset="ul"), abs=1e-9)
        assert rasterio.CRS.from_wkt(store.crs) == file.crs


def test_what_was_done_is_not_done_again(tiny, write_raster, picture, tmp_path) -> None:
    path = write_raster(picture(300, 260))
    first, store = run(tiny, [path], tmp_path / "out")
    again, _ = run(tiny, [path], tmp_path / "out")
    assert first.rows == (3, 3) and first.tiles == 9
    assert again.rows == (0, 3) and again.tiles == 0 and again.error is None
    assert first.error is not None and first.seams is not None and store.complete


def test_an_interrupted_run_goes_on_to_the_same_bits(tiny, write_raster, picture, tmp_path) -> None:
    path = write_raster(picture(420, 260))
    _, whole = run(tiny, [path], tmp_path / "whole")
    with SceneJob(tiny, [path], OPTIONS) as job:
        sink = SceneSink(tmp_path / "part", job.metadata)
        for blocks in job.mosaic().rows([1]):
            sink.append(blocks)
    report, part = run(tiny, [path], tmp_path / "part")
    assert report.rows == (4, 5)
    for a, b in zip(whole.blocks(), part.blocks(), strict=True):
        assert a.tile == b.tile
        np.testing.assert_array_equal(a.patches, b.patches)
        np.testing.assert_array_equal(a.cls, b.cls)


def test_other_options_or_another_file_are_refused(tiny, write_raster, picture, tmp_path) -> None:
    path = write_raster(picture(200, 200))
    run(tiny, [path], tmp_path / "out")
    with pytest.raises(StoreError, match=r"scene.context is 0 there and 64 now"):
        run(tiny, [path], tmp_path / "out", context=64)
    write_raster(picture(200, 200, seed=5))
    with pytest.raises(StoreError, match=r"scene.sources is"):
        run(tiny, [path], tmp_path / "out")


@pytest.mark.parametrize("suffix", [".zarr", ".tif", ".geojson"])
def test_the_suffix_says_what_is_written(tiny, write_raster, picture, tmp_path, suffix) -> None:
    path, output = write_raster(picture(200, 200)), tmp_path / f"out{suffix}"
    report = extract_scene(tiny, [path], output=output, options=OPTIONS)
    assert output.exists() and report.rows == (2, 2)
    assert sorted(item.name for item in tmp_path.iterdir()) == sorted([f"out{suffix}", "scene.tif"])
    if suffix != ".geojson":
        again = extract_scene(tiny, [path], output=output, options=OPTIONS)
        assert again.rows == (0, 2)
    if suffix == ".zarr":
        with xarray.open_dataset(output, engine="zarr") as scene:
            assert scene.patches.shape == (13, 13, 32)


def test_weights_of_a_satellite_normalise_by_their_own_statistics(tiny, write_raster, picture) -> None:
    record = weights_record("vitl16-sat493m")
    assert (record.mean, record.std) == ((0.430, 0.411, 0.296), (0.213, 0.156, 0.143))
    transform = Transform(mean=record.mean, std=record.std)
    satellite = FeatureExtractor(tiny.engine, transform, tiny.card)
    array = picture(64, 64)
    with SceneJob(satellite, [write_raster(array)], OPTIONS) as job:
        prepared = job.reader((0, 0, 64, 64))
        assert job.metadata["transform"]["mean"] == list(record.mean)
    expected = (array[2] / 255 - 0.296) / 0.143
    np.testing.assert_allclose(prepared.pixels[2].numpy(), expected, atol=1e-5)


def test_statistics_are_one_for_the_scene(tiny, write_raster, tmp_path) -> None:
    array = np.zeros((3, 300, 300), np.uint16)
    array[:, :, 150:] = 1000
    array += np.arange(300, dtype=np.uint16)
    with SceneJob(tiny, [write_raster(array)], SceneOptions(tile=128, overlap=32, scale="percentile")) as job:
        dark, bright = job.reader((0, 0, 128, 128)), job.reader((0, 172, 128, 128))
    assert dark.pixels.max() < bright.pixels.min()  # a tile on its own would be stretched to the same


def test_a_model_of_many_channels_takes_all_bands(write_raster, picture, tmp_path) -> None:
    from densedino.adapters.channels import inflate

    dino = inflate(dd.load("debug_vit", weights="random"), channels=5)
    path = write_raster(picture(150, 150, count=5))
    _, store = run(dino, [path], tmp_path / "out")
    assert store.metadata["scene"]["bands"]["names"] == ["1", "2", "3", "4", "5"]


@pytest.mark.parametrize(
    ("shape", "settings", "options", "error", "message"),
    [
        ((40, 64, 64), {}, {}, InputError, "40 bands and nothing says which are red"),
        ((3, 8, 200), {}, {}, ImageError, "8×200 pixels .H×W., less than one 16×16 patch"),
        ((3, 64, 64), {"crs": None}, {"gsd": 2.0}, InputError, "no CRS"),
        ((3, 64, 64), {}, {"bands": "B4,B3,B2"}, InputError, "no band 'B4'"),
        ((3, 64, 64), {}, {"context": -5}, InputError, "context is -5"),
    ],
)
def test_hostile_scenes_have_clear_answers(
    tiny, write_raster, picture, tmp_path, shape, settings, options, error, message
) -> None:
    path = write_raster(picture(*shape[1:], count=shape[0]), **settings)
    if "context" in options:
        path = write_raster(picture(200, 200))
    with pytest.raises(error, match=message) as caught:
        run(tiny, [path], tmp_path / "out", **options)
    assert isinstance(caught.value, DenseDinoError)


def test_nan_pixels_are_not_valid_and_the_rest_is(tiny, write_raster, picture, tmp_path) -> None:
    array = picture(200, 200).astype(np.float32)
    array[0, 100, 50] = np.nan
    _, store = run(tiny, [write_raster(array)], tmp_path / "out")
    patches, valid = store.read()
    assert np.isfinite(patches).all()
    assert np.argwhere(~valid[:12, :12]).tolist() == [[6, 3]]


def test_a_model_in_training_mode_is_refused(write_raster, picture, tmp_path) -> None:
    dino = dd.load("debug_vit", weights="random")
    dino.model.train()
    with pytest.raises(InputError, match="training mode"):
        run(dino, [write_raster(picture(64, 64))], tmp_path / "out")
