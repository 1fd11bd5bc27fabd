"""Segmentation: figures that an independent count of the same predictions gives, and bad masks named."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from densedino.errors import ImageError, InputError
from densedino.evals.maps import find_masks
from densedino.evals.pixel_probe import Fitting
from densedino.evals.plan import Plan
from densedino.evals.run import evaluate
from densedino.evals.segmentation import Settings, count_maps, figures
from densedino.evals.unet import Training

QUICK = Settings(heads=("linear",), fitting=Fitting(steps=20, batch=4))


def run(data: Path, output: Path, silent: Any, **changes: Any) -> dict[str, Any]:
    given = {"models": ("raw",), "seeds": 1, "settings": QUICK} | changes
    return evaluate(Plan(protocol="segmentation", data=data, output=output, **given), narrator=silent, workers=0)


def test_figures_are_those_of_torchmetrics_on_the_whole_set() -> None:
    from torchmetrics.classification import MulticlassJaccardIndex

    from densedino.evals.datasets import Dataset

    rng = np.random.default_rng(0)
    data = Dataset(root=Path(), layout="", kind="masks", train=(), test=(), classes=tuple("abcd"), ignore=255)
    true = rng.integers(0, 4, (5, 30, 40)).astype(np.uint8)
    true[:, :3] = 255
    predicted = np.where(rng.random(true.shape) < 0.7, true, rng.integers(0, 4, true.shape)) % 4
    parts = [count_maps(p, t, data=data, tolerance=0.0075) for p, t in zip(predicted, true, strict=True)]
    found = figures({name: sum(part[name] for part in parts) for name in parts[0]}, Settings())
    kept = true != 255
    theirs = MulticlassJaccardIndex(4)(
        torch.from_numpy(predicted[kept].astype(int)), torch.from_numpy(true[kept].astype(int))
    )
    assert found["miou"] == pytest.approx(100 * float(theirs), abs=1e-4)
    assert 0 < found["boundary_f"] < 100


def test_bad_masks_are_named(mask_folder: Path, tmp_path: Path, silent: Any) -> None:
    def damaged(name: str, array: np.ndarray | None, split: str = "trainannot") -> Path:
        root = tmp_path / name
        shutil.copytree(mask_folder, root)
        path = root / split / "3.png"
        path.unlink()
        if array is not None:
            Image.fromarray(array).save(path)
        return root

    with pytest.raises(InputError, match=r"1 of 8 images have no mask; the first is .*train/3\.png"):
        find_masks(damaged("missing", None))
    wrong = np.full((64, 96), 7, np.uint8)
    with pytest.raises(ImageError, match=r"trainannot/3\.png' has labels \[7\], which are no class: valid are 0 to 2"):
        run(damaged("label", wrong), tmp_path / "r1", silent)
    small = np.zeros((32, 96), np.uint8)
    with pytest.raises(ImageError, match=r"valannot/3\.png' has 32×96 pixels \(H×W\), its image .*val/3\.png' 64×96"):
        run(damaged("size", small, "valannot"), tmp_path / "r2", silent)
    with pytest.raises(ImageError, match="is in colours"):
        run(damaged("colour", np.zeros((64, 96, 3), np.uint8)), tmp_path / "r3", silent)
    one = tmp_path / "one"
    shutil.copytree(mask_folder, one)
    for path in (one / "trainannot").iterdir():
        Image.fromarray(np.ones((64, 96), np.uint8)).save(path)
    with pytest.raises(InputError, match=r"have one class only \(right\)"):
        run(one, tmp_path / "r4", silent)


def test_an_image_that_cannot_be_read_is_named(mask_folder: Path, tmp_path: Path, silent: Any) -> None:
    root = tmp_path / "data"
    shutil.copytree(mask_folder, root)
    (root / "train/2.png").write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"1 of 12 images have no features. The first is .*train/2\.png"):
        run(root, tmp_path / "run", silent)


def test_features_that_are_not_finite_are_named(
    mask_folder: Path, tmp_path: Path, silent: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from densedino.evals.foreign import ForeignEngine

    original = ForeignEngine.__call__

    def broken(self: Any, pixels: Any, **options: Any) -> Any:
        found = original(self, pixels, **options)
        found[0].patches[:, 0, 0, 0] = float("nan")
        return found

    monkeypatch.setattr(ForeignEngine, "__call__", broken)
    with pytest.raises(InputError, match=r"have no features. The first is .*\.png.*not finite"):
        run(mask_folder, tmp_path / "run", silent)


@pytest.mark.slow
def test_the_unet_stands_in_the_same_table(mask_folder: Path, tmp_path: Path, silent: Any) -> None:
    settings = Settings(heads=("linear",), fitting=QUICK.fitting, unet=Training(steps=12, batch=2, crop=64, shrink=1.0))
    results = run(mask_folder, tmp_path / "run", silent, models=("raw", "unet"), settings=settings)
    assert [(row["model"], row["head"]) for row in results["rows"]] == [("raw", "linear"), ("unet", "end to end")]
    assert results["rows"][1]["metrics"]["miou"]["mean"] > 5
