"""Writing a store: one commit per segment, several writers at once, what a killed writer leaves behind."""

from __future__ import annotations

import threading

import lance
import numpy as np
import pytest

import densedino as dd
from densedino.errors import StoreError
from densedino.features.extract import store_metadata
from densedino.features.layout import Row
from densedino.features.sinks import LanceSink


@pytest.fixture(scope="module")
def metadata():
    return store_metadata(dd.load("debug_vit", weights="random"))


def rows(*numbers, frame=None):
    def one(number):
        random = np.random.default_rng(number)
        return Row(
            key=f"it's {number}.png",
            source=f"/images/it's {number}.png",
            sha256=f"{number:064x}",
            stamp=(number, 10 * number),
            frame=frame,
            last_frame=None,
            source_size=(48, 32),
            input_size=(48, 32),
            grid=(3, 2),
            cls=random.standard_normal(32).astype(np.float16),
            registers=random.standard_normal((4, 32)).astype(np.float16),
            patches=random.standard_normal((3, 2, 32)).astype(np.float16),
            valid=np.array([[True, True], [True, False], [True, True]]),
            layers={},
        )

    return [one(number) for number in numbers]


def test_what_was_appended_is_read_back(tmp_path, metadata):
    LanceSink(tmp_path / "f", metadata).append(rows(1, 2))
    sink = LanceSink(tmp_path / "f", metadata)
    sink.append(rows(2, 3))
    assert len(sink) == 3
    assert sink.stamp("it's 2.png") == (2, 20)
    assert sink.stamp("4.png") is None
    assert sink.standing("it's 3.png").source == "/images/it's 3.png"
    store = dd.FeatureStore(tmp_path / "f")
    for wanted, key in zip(rows(1, 2, 3), store.keys(), strict=True):
        assert key == wanted.key
        assert np.array_equal(store.numpy(key), wanted.patches)
        assert np.array_equal(store[key].valid[0].numpy(), wanted.valid)
        assert np.array_equal(store[key].registers[0].numpy(), wanted.registers)


def test_rows_can_be_taken_out(tmp_path, metadata):
    sink = LanceSink(tmp_path / "f", metadata)
    sink.append(rows(1, 2, 3))
    sink.remove(["it's 2.png", "none"])
    assert len(sink) == 2
    sink.append(rows(2))
    assert dd.FeatureStore(tmp_path / "f").keys() == ["it's 1.png", "it's 3.png", "it's 2.png"]


def test_writers_at_the_same_time_repeat_nothing(tmp_path, metadata):
    sinks = [LanceSink(tmp_path / "f", metadata) for _ in range(3)]

    def write(sink, first):
        for number in range(first, first + 20, 2):
            sink.append(rows(number, number + 1))

    threads = [threading.Thread(target=write, args=(sink, 5 * i)) for i, sink in enumerate(sinks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    keys = dd.FeatureStore(tmp_path / "f").keys()
    assert sorted(keys) == sorted(f"it's {number}.png" for number in range(30))


def test_what_a_killed_first_commit_leaves_is_no_obstacle(tmp_path, metadata):
    for folder in ("data", "_versions", "_transactions"):
        (tmp_path / "f" / folder).mkdir(parents=True)
    (tmp_path / "f" / "data" / "half.lance").write_bytes(b"half")
    (tmp_path / "f" / "_transactions" / "0-x.txn").write_bytes(b"half")
    sink = LanceSink(tmp_path / "f", metadata)
    sink.append(rows(1))
    assert len(dd.FeatureStore(tmp_path / "f")) == 1


def test_old_versions_do_not_pile_up(tmp_path, metadata, monkeypatch):
    from datetime import timedelta

    from densedino.features import sinks

    monkeypatch.setattr(sinks, "_CLEAN_AFTER", timedelta(0))
    sink = LanceSink(tmp_path / "f", metadata)
    reader = lance.dataset(tmp_path / "f")
    for number in range(70):
        sink.append(rows(number))
    assert len(list((tmp_path / "f" / "_versions").iterdir())) < 20
    assert len(dd.FeatureStore(tmp_path / "f")) == 70
    assert reader.count_rows() == 0  # a snapshot


def test_somebodys_folder_is_left_alone(tmp_path, metadata):
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "thesis.tex").touch()
    with pytest.raises(StoreError, match=r"not empty.*thesis\.tex.*-o"):
        LanceSink(tmp_path / "f", metadata)
    assert [item.name for item in (tmp_path / "f").iterdir()] == ["thesis.tex"]
