"""Depth: the loss and the bins by their formulas, and a run that learns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image

from densedino.errors import ImageError
from densedino.evals.depth import Settings, depth_from_bins, sig_loss
from densedino.evals.pixel_probe import Fitting
from densedino.evals.plan import Plan
from densedino.evals.run import evaluate

if TYPE_CHECKING:
    from pathlib import Path


def test_bins_and_loss_are_their_formulas() -> None:
    settings = Settings(bins=3, nearest=1.0, farthest=3.0)
    depth = depth_from_bins(torch.tensor([[-5.0, 0.9, 0.0], [0.0, 0.0, 0.0]]), settings)
    torch.testing.assert_close(depth, torch.tensor([(0.1 * 1 + 1.0 * 2 + 0.1 * 3) / 1.2, 2.0]))
    d = torch.tensor([0.1, -0.2, 0.4])
    found = sig_loss(torch.exp(d), torch.ones(3))
    torch.testing.assert_close(found, torch.sqrt(d.var() + 0.15 * d.mean() ** 2))


@pytest.fixture
def depth_folder(tmp_path: Path) -> Path:
    """Brightness is depth: dark is near."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 3)):
        for part in ("images", "depths"):
            (tmp_path / "data" / part / split).mkdir(parents=True)
        for i in range(count):
            depth = np.kron(rng.uniform(1, 9, (4, 6)), np.ones((16, 16)))
            grey = np.repeat((depth * 25).astype(np.uint8)[..., None], 3, 2)
            depth[:4] = 0
            Image.fromarray(grey).save(tmp_path / f"data/images/{split}/{i}.png")
            np.save(tmp_path / f"data/depths/{split}/{i}.npy", depth.astype(np.float32))
    return tmp_path / "data"


def test_a_run_learns_and_bad_maps_are_named(depth_folder: Path, tmp_path: Path, silent: Any) -> None:
    quick = Settings(bins=32, fitting=Fitting(steps=200, batch=6, pixel_stride=4, lr=1e-2))
    plan = Plan(protocol="depth", data=depth_folder, models=("raw",), output=tmp_path / "run", seeds=1, settings=quick)
    metrics = evaluate(plan, narrator=silent, workers=0)["rows"][0]["metrics"]
    assert metrics["rmse"]["mean"] < 1.6 and metrics["delta1"]["mean"] > 0.5, metrics
    np.save(depth_folder / "depths/val/1.npy", np.ones((3, 3), np.float32))
    with pytest.raises(ImageError, match=r"val/1\.npy' has 3×3 pixels"):
        evaluate(
            Plan(
                protocol="depth", data=depth_folder, models=("raw",), output=tmp_path / "bad", seeds=1, settings=quick
            ),
            narrator=silent,
            workers=0,
        )
