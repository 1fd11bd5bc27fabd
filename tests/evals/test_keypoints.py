"""Keypoints: SPair's layout and tables of pairs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from densedino.errors import InputError
from densedino.evals.keypoints import find_pairs
from densedino.evals.plan import Plan
from densedino.evals.run import evaluate

if TYPE_CHECKING:
    from pathlib import Path


def picture(path: Path, left: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = np.full((96, 128, 3), 30, np.uint8)
    image[32:64, left : left + 32] = [220, 60, 40]
    Image.fromarray(image).save(path)


def test_pairs_of_a_table(tmp_path: Path, silent: Any) -> None:
    picture(tmp_path / "a.png", 16)
    picture(tmp_path / "b.png", 16)
    row = {"source": "a.png", "target": "b.png", "source_points": [[24, 40]], "target_points": [[24, 40]], "scale": 100}
    (tmp_path / "pairs.json").write_text(json.dumps([row]))
    plan = Plan(protocol="keypoints", data=tmp_path, models=("raw",), output=tmp_path / "run")
    assert evaluate(plan, narrator=silent, workers=0)["rows"][0]["metrics"]["pck@0.1"]["mean"] == 100
    (tmp_path / "pairs.json").write_text(json.dumps([{**row, "target_points": []}]))
    with pytest.raises(InputError, match=r"pair 0 .* has 1 and 0 points"):
        find_pairs(tmp_path)
    (tmp_path / "pairs.json").write_text(json.dumps([{**row, "target": "c.png"}]))
    with pytest.raises(InputError, match=r"'c.png', which is not there"):
        find_pairs(tmp_path)
    (tmp_path / "pairs.json").unlink()
    with pytest.raises(InputError, match="neither"):
        find_pairs(tmp_path)


def test_spair(tmp_path: Path) -> None:
    for name in ("one", "two"):
        picture(tmp_path / f"JPEGImages/cat/{name}.jpg", 32)
    (tmp_path / "PairAnnotation/test").mkdir(parents=True)
    annotation = {
        "category": "cat",
        "src_imname": "one.jpg",
        "trg_imname": "two.jpg",
        "src_kps": [[1, 2], [3, 4]],
        "trg_kps": [[5, 6], [7, 8]],
        "trg_bndbox": [10, 10, 50, 90],
    }
    (tmp_path / "PairAnnotation/test/000001-one-two:cat.json").write_text(json.dumps(annotation))
    pair = find_pairs(tmp_path).pairs[0]
    assert (pair.scale, pair.source_points, pair.target) == (80.0, ((1.0, 2.0), (3.0, 4.0)), "JPEGImages/cat/two.jpg")
