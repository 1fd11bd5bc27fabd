"""Subsets and manifests."""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import TYPE_CHECKING

import pytest

from densedino.errors import InputError
from densedino.evals.datasets import few, limited, manifest
from densedino.evals.labelled import find_labelled

if TYPE_CHECKING:
    from pathlib import Path


def test_few_are_drawn_of_every_class_by_the_seed(class_folder: Path) -> None:
    data = find_labelled(class_folder)
    assert Counter(sample.label for sample in few(data.train, 0.34, seed=0)) == {0: 2, 1: 2, 2: 2}
    assert len(few(data.train, 0.01, seed=0)) == 3, "at least one of each"
    assert few(data.train, 0.5, seed=1) == few(data.train, 0.5, seed=1) != few(data.train, 0.5, seed=2)
    assert few(data.train, 1, seed=3) == data.train
    with pytest.raises(InputError, match="share is 0"):
        few(data.train, 0, seed=0)


def test_a_limit_keeps_every_class(class_folder: Path) -> None:
    data = limited(find_labelled(class_folder), 6)
    assert Counter(sample.label for sample in data.train) == {0: 2, 1: 2, 2: 2}
    assert limited(data, None) is data and len(limited(data, 100).train) == 6
    with pytest.raises(InputError, match="limit is 1"):
        limited(data, 1)


def test_a_manifest_has_the_hash_of_every_file(class_folder: Path) -> None:
    rows = manifest(find_labelled(class_folder))
    assert len(rows) == 30
    for row in rows[:3]:
        assert row["sha256"] == hashlib.sha256((class_folder / row["key"]).read_bytes()).hexdigest()
        assert row["class"] == row["key"].split("/")[1]
