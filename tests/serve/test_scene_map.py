"""A scene as a map: every zoom, every border, computed and stored."""

import io
import math

import numpy as np
import pytest
from PIL import Image

from densedino.errors import StoreError
from densedino.serve.scene_map import TILE, open_scene, scene_card


@pytest.fixture(scope="module")
def scene_file(tmp_path_factory):
    import rasterio

    path = tmp_path_factory.mktemp("scene") / "scene.tif"
    random = np.random.default_rng(0)
    small = random.integers(0, 256, (70, 90, 3), dtype=np.uint8)
    pixels = np.asarray(Image.fromarray(small).resize((1450, 1120)))
    options = {"height": 1120, "width": 1450, "count": 3, "dtype": "uint8", "crs": "EPSG:32632"}
    with rasterio.open(path, "w", driver="GTiff", transform=rasterio.Affine(1, 0, 5e5, 0, -1, 5e6), **options) as file:
        file.write(pixels.transpose(2, 0, 1))
    return path, pixels


@pytest.fixture(scope="module")
def opened(scene_file, tiny):
    scene = open_scene(str(scene_file[0]), tiny)
    yield scene
    scene.scene.close()


def places(scene):
    for level in range(scene.levels):
        side = TILE << level
        for row in range(math.ceil(scene.grid[0] / side)):
            for column in range(math.ceil(scene.grid[1] / side)):
                yield level, row, column


def test_tiles_cover_the_scene_and_no_more(opened):
    assert opened.grid == (70, 91) and opened.levels == 3
    assert all(place in opened for place in places(opened))
    assert (0, 3, 0) not in opened and (3, 0, 0) not in opened and (0, -1, 0) not in opened and (2, 0, 1) not in opened


def test_pictures_show_their_part(opened, scene_file):
    tile = np.asarray(Image.open(io.BytesIO(opened.picture((0, 1, 2))))).astype(int)
    assert tile.shape == (512, 1450 - 1024, 3)
    assert np.abs(tile - scene_file[1][512:1024, 1024:]).mean() < 4, "a JPEG of those very pixels"


def test_every_tile_has_its_patches_and_those_inside_are_those_of_its_window(opened, tiny):
    for place in places(opened):
        prepared, skip = opened.prepared(place, tiny)
        features = opened.cut(tiny.run([prepared]), place, skip)
        assert features.grid == opened._patches(place) and features.grid[0] <= TILE >= features.grid[1], place
        assert features.valid.shape[1:] == features.patches.shape[1:3]
    _, skip = opened.prepared((0, 1, 1), tiny)
    assert skip == (4, 4), "the model sees a margin"


def test_a_store_gives_what_was_extracted(opened, scene_file, tiny, tmp_path):
    from densedino.geo.extraction import SceneOptions, extract_scene

    extract_scene(tiny, [scene_file[0]], output=tmp_path / "out", options=SceneOptions(tile=256))
    assert scene_card(tmp_path / "out").name == "debug_vit" and scene_card(tmp_path) is None
    scene = open_scene(str(tmp_path / "out"), tiny)
    whole, _ = scene.store.read()
    assert np.array_equal(scene.stored((0, 1, 2)).patches[0].numpy(), whole[32:64, 64:91].astype(np.float32))
    assert np.array_equal(scene.stored((2, 0, 0)).patches[0].numpy(), whole[::4, ::4].astype(np.float32))
    thin, known = scene._thinned()
    assert np.array_equal(thin, whole[::8, ::8]) and known.shape == (9, 12)
    assert opened.stored((0, 0, 0)) is None
    scene.scene.close()


def test_a_store_of_other_weights_is_refused(scene_file, tiny, tmp_path):
    import densedino as dd
    from densedino.geo.extraction import SceneOptions, extract_scene

    extract_scene(tiny, [scene_file[0]], output=tmp_path / "out", options=SceneOptions(tile=512))
    with pytest.raises(StoreError, match="--weights"):
        open_scene(str(tmp_path / "out"), dd.load("debug_vit_swiglu", weights="random"))
