from __future__ import annotations

import numpy as np
import pytest

from densedino.errors import StoreError
from densedino.features.scene_sink import Block, SceneSink

METADATA = {
    "embed_dim": 4,
    "format": 1,
    "densedino": "0",
    "model": "debug_vit",
    "precision": "fp32",
    "weights": {"sha256": "0" * 64},
    "transform": {"mean": [0.5]},
    "fingerprint": "a",
    "scene": {"affine": [1.0, 0.0, 0.0, 0.0, 1.0, 0.0], "tile": 512},
}


def row(number):
    block = Block(
        tile=(number, 0),
        origin=(number * 2, 0),
        patches=np.full((2, 3, 4), number, np.float16),
        valid=np.ones((2, 3), bool),
        cls=np.zeros(4, np.float16),
    )
    return [block]


def test_two_sinks_write_each_row_once(tmp_path) -> None:
    first, second = SceneSink(tmp_path / "s", METADATA), SceneSink(tmp_path / "s", METADATA)
    first.append(row(0))
    second.append(row(1))
    second.append(row(0))
    first.append(row(1))
    assert first.done == second.done == {0, 1}
    assert SceneSink(tmp_path / "s", METADATA)._dataset.count_rows() == 2


def test_valid_is_null_where_all_is(tmp_path) -> None:
    sink = SceneSink(tmp_path / "s", METADATA)
    sink.append(row(0))
    assert sink._dataset.to_table(columns=["valid"])["valid"].to_pylist() == [None]


def test_other_numbers_are_refused_by_name(tmp_path) -> None:
    SceneSink(tmp_path / "s", METADATA)
    other = METADATA | {"fingerprint": "b", "scene": METADATA["scene"] | {"tile": 256}}
    with pytest.raises(StoreError, match=r"scene.tile is 512 there and 256 now"):
        SceneSink(tmp_path / "s", other)


def test_somebodys_folder_is_left_alone(tmp_path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(StoreError, match=r"holds no features .thesis.tex"):
        SceneSink(tmp_path, METADATA)
    assert [item.name for item in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_killed_start_is_in_nobodys_way(tmp_path) -> None:
    (tmp_path / "s" / "data").mkdir(parents=True)
    (tmp_path / "s" / ".lock").touch()
    SceneSink(tmp_path / "s", METADATA).append(row(0))
