"""Strips of a scene become pixels as the whole would, and a map is a whole COG in the scene's place, or nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from densedino.errors import InputError
from densedino.features.scenes import SceneStore
from densedino.features.tokens import upsample_tokens
from densedino.geo.extraction import SceneOptions, extract_scene
from densedino.geo.pixel_maps import cog_writer, own_rows, strips, to_pixels
from densedino.geo.raster import rasterio


@pytest.fixture
def store(tiny, picture, write_raster, tmp_path):
    array = picture(200, 150).clip(1)
    array[:, :60, :40] = 0
    path = write_raster(array, nodata=0)
    options = SceneOptions(tile=64, overlap=32)
    extract_scene(tiny, [path], output=tmp_path / "s", options=options, check=False)
    return SceneStore(tmp_path / "s")


def test_strips_give_every_row_once_with_a_row_around(store):
    patches, valid = store.read()
    expected = valid.copy()
    expected[-1], expected[:, -1] = expected[-2], expected[:, -2]  # half a patch of picture, half of padding
    assert not valid[-1].any() and not valid[:, -1].any() and not expected[:3, :2].any()
    seen = []
    for top, part, known in strips(store):
        own = own_rows(top, store)
        seen.append(part[own])
        first = top - own.start
        np.testing.assert_array_equal(part, patches[first : first + len(part)])
        assert known[own].tolist() == expected[top : top + 4].tolist()
    np.testing.assert_array_equal(np.concatenate(seen), patches)


def test_pixels_of_strips_are_those_of_the_whole(store):
    patches, _ = store.read()
    values = torch.from_numpy(patches[..., :2].astype(np.float32))
    whole = torch.cat(
        [to_pixels(torch.from_numpy(p[..., :2]), k, top=t, store=store)[0] for t, p, k in strips(store)], 1
    )
    mask = torch.cat(
        [to_pixels(torch.from_numpy(p[..., :2]), k, top=t, store=store)[1] for t, p, k in strips(store)], 0
    )
    assert whole.shape == (2, 200, 150) and mask.shape == (200, 150)
    assert not mask[:48, :32].any() and mask[64:, 48:].all()
    expected = upsample_tokens(values[None], (208, 160), stride=16)[0, :, :200, :150]
    inner = (slice(None), slice(96, 200), slice(64, 150))  # away from what is not known
    torch.testing.assert_close(whole[inner], expected[inner], atol=1e-5, rtol=0)


@pytest.mark.parametrize("per_patch", [False, True])
def test_a_map_lies_where_the_scene_lies(store, tmp_path, per_patch):
    shape = store.grid if per_patch else (200, 150)
    values = np.arange(2 * shape[0] * shape[1], dtype=np.float32).reshape(2, *shape)
    path = tmp_path / "m.tif"
    with cog_writer(
        path, store, bands=("a", "b"), dtype="float32", nodata=-1, tags={"KEY": "value"}, per_patch=per_patch
    ) as write:
        write(0, values[:, :7])
        write(7, values[:, 7:])
    module = rasterio()
    with module.open(path) as file:
        np.testing.assert_array_equal(file.read(), values)
        assert file.descriptions == ("a", "b") and file.tags()["KEY"] == "value" and file.nodata == -1
        assert file.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG" and file.crs.to_epsg() == 32632
        step = 160 if per_patch else 10
        assert file.transform == module.Affine(step, 0, 500_000, 0, -step, 5_000_000)


def test_a_map_that_fails_leaves_nothing(store, tmp_path):
    with (
        pytest.raises(RuntimeError),
        cog_writer(tmp_path / "m.tif", store, bands=("a",), dtype="uint8", nodata=0, tags={}),
    ):
        raise RuntimeError
    assert not list(tmp_path.glob("*m.tif*"))
    with (
        pytest.raises(InputError, match=r"\.tif"),
        cog_writer(tmp_path / "m.png", store, bands=("a",), dtype="uint8", nodata=0, tags={}),
    ):
        pass
