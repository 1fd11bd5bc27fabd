"""Mask propagation: exact on features that say where everything goes, and against a loop that is easy to read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from densedino.errors import InputError
from densedino.evals.plan import Plan
from densedino.evals.run import evaluate
from densedino.evals.tracking import find_davis, propagate

if TYPE_CHECKING:
    from pathlib import Path


def plain(maps: list, first: torch.Tensor, *, context: int, radius: float, neighbours: int, temperature: float) -> list:
    labels = [first]
    h, w, _ = maps[0].shape
    for t in range(1, len(maps)):
        sources = sorted({0, *range(max(0, t - context), t)}) if t > context else list(range(t))
        out = torch.zeros_like(first)
        for y in range(h):
            for x in range(w):
                votes = [
                    (float(maps[t][y, x] @ maps[s][v, u]), labels[s][v, u])
                    for s in sources
                    for v in range(h)
                    for u in range(w)
                    if (v - y) ** 2 + (u - x) ** 2 <= radius**2
                ]
                votes = sorted(votes, key=lambda vote: -vote[0])[:neighbours]
                weights = torch.tensor([cosine / temperature for cosine, _ in votes]).softmax(0)
                out[y, x] = sum(weight * label for weight, (_, label) in zip(weights, votes, strict=True))
        labels.append(out)
    return labels


def test_propagation_is_that_of_a_plain_loop() -> None:
    torch.manual_seed(0)
    maps = [F.normalize(torch.randn(5, 6, 8), dim=-1) for _ in range(5)]
    first = torch.rand(5, 6, 2)
    settings = {"context": 2, "radius": 2.5, "neighbours": 3, "temperature": 0.2}
    ours, theirs = propagate(maps, first, **settings), plain(maps, first, **settings)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_a_moving_box_is_followed(video_folder: Path, tmp_path: Path, silent: Any) -> None:
    plan = Plan(protocol="tracking", data=video_folder, models=("raw",), output=tmp_path / "run")
    results = evaluate(plan, narrator=silent, workers=0)
    metrics = results["rows"][0]["metrics"]
    assert metrics["j"]["mean"] > 70
    assert metrics["j&f"]["mean"] == pytest.approx((metrics["j"]["mean"] + metrics["f"]["mean"]) / 2, abs=1e-5)


def test_layouts_and_what_is_missing(video_folder: Path, tmp_path: Path) -> None:
    data = find_davis(video_folder)
    assert [sample.group for sample in data.test] == ["fast"] * 5 + ["slow"] * 5
    official = tmp_path / "DAVIS"
    for part, old in (("JPEGImages", "frames"), ("Annotations", "masks")):
        (official / part).mkdir(parents=True)
        (official / part / "480p").symlink_to(video_folder / old)
    (official / "ImageSets/2017").mkdir(parents=True)
    (official / "ImageSets/2017/val.txt").write_text("slow\n")
    assert {sample.group for sample in find_davis(official).test} == {"slow"}
    (tmp_path / "frames/one").mkdir(parents=True)
    (tmp_path / "masks").mkdir()
    with pytest.raises(InputError, match="has 0 frames; at least 3"):
        find_davis(tmp_path)
    with pytest.raises(InputError, match="neither"):
        find_davis(tmp_path / "frames")
    np.testing.assert_equal(len(data.samples), 10)
