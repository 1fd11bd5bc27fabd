"""Retrieval: layouts of Oxford, and figures by hand."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from densedino.errors import InputError
from densedino.evals.plan import Plan
from densedino.evals.retrieval import Settings, _benchmark, figures, find_retrieval
from densedino.evals.run import evaluate

if TYPE_CHECKING:
    from pathlib import Path


def test_images_with_classes(class_folder: Path, tmp_path: Path, silent: Any) -> None:
    plan = Plan(protocol="retrieval", data=class_folder, models=("raw",), output=tmp_path / "run")
    metrics = evaluate(plan, narrator=silent, workers=0)["rows"][0]["metrics"]
    assert metrics["map"]["mean"] == 100 and metrics["p@10"]["mean"] == 100


def test_easy_medium_and_hard() -> None:
    counts = _benchmark(np.array([0, 1, 2, 3]), easy=np.array([0]), hard=np.array([3]), junk=np.array([1]), at=1)
    found = figures(counts, Settings(at=1))
    # Medium, without 1: 0, 2, 3 -> ranks 0 and 2. Hard, without 0 and 1: 2, 3 -> rank 1.
    assert found["map"] == pytest.approx(100 * ((1 + 1) / 2 + (1 / 2 + 2 / 3) / 2) / 2)
    assert found["map_easy"] == 100 and found["map_hard"] == pytest.approx(100 * (0 + 1 / 2) / 2)
    nothing = _benchmark(np.array([0]), easy=np.array([], int), hard=np.array([], int), junk=np.array([], int), at=1)
    assert np.isnan(figures(nothing, Settings(at=1))["map"])


def test_oxford_in_both_forms(tmp_path: Path, silent: Any) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "jpg").mkdir()
    for name in ("q", "good", "ok", "junk", "other"):
        colour = [200, 40, 40] if name in ("q", "good", "ok") else [40, 60, 200]
        image = (np.array(colour) + rng.normal(0, 5, (48, 48, 3))).clip(0, 255).astype(np.uint8)
        Image.fromarray(image).save(tmp_path / f"jpg/{name}.png")
    (tmp_path / "gt_files").mkdir()
    (tmp_path / "gt_files/tower_1_query.txt").write_text("oxc1_q 1.0 2.0 30.0 40.0\n")
    for kind, names in (("good", "q\ngood"), ("ok", "ok"), ("junk", "junk")):
        (tmp_path / f"gt_files/tower_1_{kind}.txt").write_text(names + "\n")
    data = find_retrieval(tmp_path)
    assert data.relevant == {"jpg/q.png": (("jpg/q.png", "jpg/good.png", "jpg/ok.png"), (), ("jpg/junk.png",))}
    plan = Plan(protocol="retrieval", data=tmp_path, models=("raw",), output=tmp_path / "run")
    assert evaluate(plan, narrator=silent, workers=0)["rows"][0]["metrics"]["map"]["mean"] == 100
    truth = {"imlist": ["good", "ok", "junk"], "qimlist": ["q"], "gnd": [{"easy": [0], "hard": [1], "junk": [2]}]}
    (tmp_path / "gnd_roxford5k.json").write_text(json.dumps(truth))
    data = find_retrieval(tmp_path)
    assert len(data.train) == 4, "queries are not searched"
    assert data.relevant["jpg/q.png"] == (("jpg/good.png",), ("jpg/ok.png",), ("jpg/junk.png",))
    (tmp_path / "gnd_roxford5k.json").unlink()
    (tmp_path / "gt_files/tower_1_ok.txt").write_text("nowhere\n")
    with pytest.raises(InputError, match="'nowhere'"):
        find_retrieval(tmp_path)


def test_a_pickle_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "gnd_roxford5k.pkl").write_bytes(b"")
    with pytest.raises(InputError, match="as a pickle, which can run anything"):
        find_retrieval(tmp_path)
