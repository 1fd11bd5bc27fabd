from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import densedino as dd
from densedino.errors import InputError, StoreError
from densedino.features.scene_sink import Block, SceneSink
from densedino.features.scenes import SceneStore
from densedino.features.store import FeatureStore
from densedino.images.tiling import TilePlan

PLAN = TilePlan.make((320, 400), tile=128, overlap=48)
AFFINE = [160.0, 32.0, 500_000.0, 16.0, -160.0, 5_000_000.0]
DIM = 8


def metadata(**changes):
    card = dd.load("debug_vit", weights="random").card
    scene = {
        "grid": list(PLAN.grid),
        "row_starts": list(PLAN.row_starts),
        "col_starts": list(PLAN.col_starts),
        "affine": AFFINE,
        "crs": None,
    }
    base = {"format": 1, "densedino": "0", "model": "debug_vit", "weights": card.to_dict(), "untrained": True}
    base |= {"precision": "fp32", "stride": 16, "embed_dim": DIM, "transform": {}, "fingerprint": "a", "scene": scene}
    return base | changes


def blocks_of(r, tokens, valid):
    out = []
    for c in range(PLAN.shape[1]):
        (top, bottom), (left, right) = PLAN.rows_of(r), PLAN.cols_of(c)
        part = (slice(top, bottom), slice(left, right))
        cls = np.full(DIM, r * 10 + c, np.float16)
        out.append(Block(tile=(r, c), origin=(top, left), patches=tokens[part], valid=valid[part], cls=cls))
    return out


@pytest.fixture(scope="module")
def truth():
    random = np.random.default_rng(0)
    return random.standard_normal((*PLAN.grid, DIM)).astype(np.float16), random.random(PLAN.grid) < 0.9


@pytest.fixture(scope="module")
def store(tmp_path_factory, truth):
    path = tmp_path_factory.mktemp("scene") / "out"
    sink = SceneSink(path, metadata())
    for r in (2, 0, 3, 1, *range(4, PLAN.shape[0])):  # in any order
        sink.append(blocks_of(r, *truth))
    return SceneStore(path)


def test_all_of_it_comes_back(store, truth) -> None:
    patches, valid = store.read()
    np.testing.assert_array_equal(patches, truth[0])
    np.testing.assert_array_equal(valid, truth[1])
    assert store.count_valid() == truth[1].sum()
    assert store.complete and len(store) == PLAN.shape[0] * PLAN.shape[1]
    assert "20×25 patches" in repr(store) and "UNTRAINED" in repr(store)


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_any_part_comes_back(store, truth, data) -> None:
    rows, cols = (
        sorted(data.draw(st.lists(st.integers(0, n), min_size=2, max_size=2, unique=True))) for n in PLAN.grid
    )
    patches, valid = store.read(rows=tuple(rows), cols=tuple(cols))
    np.testing.assert_array_equal(patches, truth[0][slice(*rows), slice(*cols)])
    np.testing.assert_array_equal(valid, truth[1][slice(*rows), slice(*cols)])


def test_blocks_come_in_order_and_only_those_asked_for(store) -> None:
    tiles = [block.tile for block in store.blocks()]
    assert tiles == sorted(tiles) and len(tiles) == len(store)
    asked = [block.tile for block in store.blocks(rows=(0, 1), cols=(24, 25))]
    assert asked == [(0, PLAN.shape[1] - 1)]
    assert next(store.blocks()).cls.tolist() == [0.0] * DIM


@pytest.mark.parametrize("rows", [(3, 3), (-1, 4), (0, 21)])
def test_a_part_that_there_is_not(store, rows) -> None:
    with pytest.raises(InputError, match="no part of this grid, which has 20 rows"):
        store.read(rows=rows)


@settings(deadline=None)
@given(st.integers(0, 19), st.integers(0, 24), st.floats(0.01, 0.99), st.floats(0.01, 0.99))
def test_ground_and_patch(store, i, j, down, right) -> None:
    x, y = store.xy(i, j)
    assert store.index(x, y) == (i, j)
    a, b, c, d, e, f = AFFINE
    assert (x, y) == (a * (j + 0.5) + b * (i + 0.5) + c, d * (j + 0.5) + e * (i + 0.5) + f)
    assert store.index(a * (j + right) + b * (i + down) + c, d * (j + right) + e * (i + down) + f) == (i, j)


def test_rows_hold_their_place(store) -> None:
    table = store.dataset.to_table(columns=["row", "col", "grid_h", "grid_w", "x", "y"]).to_pylist()
    a, b, c, *_ = AFFINE
    for row in table:
        assert row["x"] == a * (row["col"] + row["grid_w"] / 2) + b * (row["row"] + row["grid_h"] / 2) + c


def test_a_sample_is_of_valid_patches_from_everywhere(store, truth) -> None:
    few = store.sample(100)
    assert 40 < len(few) < 180
    np.testing.assert_array_equal(few, store.sample(100))
    everything = store.sample(10**9)
    assert len(everything) == truth[1].sum()


def test_what_does_not_stand_is_not_valid(tmp_path, truth) -> None:
    sink = SceneSink(tmp_path / "out", metadata())
    sink.append(blocks_of(1, *truth))
    sink.append(blocks_of(1, *truth))  # again, as another worker may
    part = SceneStore(tmp_path / "out")
    assert not part.complete and len(part) == PLAN.shape[1]
    _, valid = part.read()
    top, bottom = PLAN.rows_of(1)
    np.testing.assert_array_equal(valid[top:bottom], truth[1][top:bottom])
    assert not valid[:top].any() and not valid[bottom:].any()
    assert f"{PLAN.shape[1]} of" in repr(part)


def test_stores_of_scenes_and_of_images_are_told_apart(store, tmp_path) -> None:
    with pytest.raises(StoreError, match=r"holds a scene, not images. Open it: dd.SceneStore"):
        FeatureStore(store.path)
    with pytest.raises(StoreError, match="does not exist"):
        SceneStore(tmp_path / "none")
    dino = dd.load("debug_vit", weights="random")
    np.save(tmp_path / "x.npy", np.zeros(3))
    from PIL import Image

    Image.new("RGB", (32, 32)).save(tmp_path / "x.png")
    dd.extract(dino, [tmp_path / "x.png"], output=tmp_path / "images")
    with pytest.raises(StoreError, match=r"holds features of images, not a scene. Open it: dd.FeatureStore"):
        SceneStore(tmp_path / "images")
    assert isinstance(dd.SceneStore(store.path), SceneStore) and torch.is_tensor(torch.zeros(1))
