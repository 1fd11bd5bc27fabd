"""From labelled folders to adapters, in every way of tuning; the same after an interruption."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file

from densedino.adapters.adapt import AdaptConfig, Adapted, adapt
from densedino.adapters.batches import Augment
from densedino.adapters.fit import FitConfig, Progress
from densedino.adapters.heads import HEADS, HeadConfig
from densedino.adapters.tasks import Task
from densedino.adapters.tuning import TuneConfig
from densedino.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

SHORT = AdaptConfig(
    task=Task(kind="segmentation"),
    fit=FitConfig(steps=60, every=30, batch_size=4, lr=1e-2),
    fit_together=FitConfig(steps=4, every=2, batch_size=2),
    augment=Augment(crop=64),
)


def run(data: Path, output: Path, config: AdaptConfig = SHORT, **options: object) -> Adapted:
    return adapt(data, config=config, output=output, model="debug_vit", weights="random", device="cpu", **options)  # type: ignore[arg-type]


def test_squares_are_found(masks: Path, tmp_path: Path) -> None:
    said: list[str] = []
    result = run(masks, tmp_path / "out", say=said.append)
    assert result.metric == "mIoU" and result.score > 70 and result.frozen is None
    assert result.trained == 2 * 32 + 2 * 32 + 2  # batch norm, and a linear map to two classes
    assert "6 images to train with, 2 to validate, 2 classes" in said[0]
    adapter = result.load()
    prediction = adapter(masks / "images" / "3.png")[0]
    assert prediction.labels is not None and prediction.labels.shape == (64, 80)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["score"]["value"] == result.score and len(report["history"]["head"]) == 2
    assert (tmp_path / "out" / "examples.png").stat().st_size > 1000
    assert report["backbone"]["licence"] and report["train"] and report["val"]


def test_depth_is_told(depths: Path, tmp_path: Path) -> None:
    task = Task(kind="depth", depth_unit=0.001, most_depth=9.0)
    config = replace(SHORT, task=task, fit=FitConfig(steps=80, every=80, batch_size=4, lr=1e-2))
    result = run(depths, tmp_path / "out", config)
    assert result.metric == "RMSE" and result.score < 2.0
    depth = result.load()([depths / "images" / "3.png"])[0].depth
    assert depth is not None and depth.shape == (64, 80) and bool((depth > 0).all())


def test_classes_are_told(classes: Path, tmp_path: Path) -> None:
    config = replace(SHORT, task=Task(kind="classification"), resize=(48, 48))
    result = run(classes, tmp_path / "out", config)
    assert result.score == 100.0
    told = result.load()(classes / "red" / "0.png")[0]
    assert told.name == "red" and told.probabilities is not None and float(told.probabilities.sum()) == pytest.approx(1)


@pytest.mark.parametrize("kind", [k for k in HEADS if k not in ("bn-linear", "linear")])
def test_every_head_is_fitted_and_loaded(kind: str, masks: Path, tmp_path: Path) -> None:
    config = replace(
        SHORT,
        head=HeadConfig(kind=kind, width=16),  # type: ignore[arg-type]
        fit=FitConfig(steps=2, every=2, batch_size=2),
        fit_together=FitConfig(steps=2, every=2, batch_size=2),
        resize=(64, 64),
    )
    result = run(masks, tmp_path / "out", config)
    assert 0 <= result.score <= 100 and result.load()(masks / "images" / "3.png")[0].labels is not None


@pytest.mark.parametrize("kind", ["lora", "dora", "norm-bias", "full"])
def test_the_backbone_is_tuned_and_comes_back(kind: str, masks: Path, tmp_path: Path) -> None:
    config = replace(SHORT, tune=TuneConfig(kind=kind, rank=2))  # type: ignore[arg-type]
    config = replace(config, fit=FitConfig(steps=4, every=2))
    result = run(masks, tmp_path / "out", config)
    assert result.frozen is not None and result.trained > 130
    adapter = result.load()
    from densedino.weights.loading import load_weights

    plain = load_weights("debug_vit", weights="random")[0]
    assert list(adapter.dino.model.state_dict()).sort() == list(plain.state_dict()).sort()
    changed = adapter.dino.model.blocks[0].attn.qkv  # type: ignore[union-attr,index]
    assert not torch.equal(
        changed.bias if kind == "norm-bias" else changed.weight,
        getattr(plain.blocks[0].attn.qkv, "bias" if kind == "norm-bias" else "weight"),
    )  # type: ignore[union-attr,index]


def test_interrupted_is_the_same(masks: Path, tmp_path: Path) -> None:
    config = replace(SHORT, tune=TuneConfig(kind="dora", rank=2), fit=FitConfig(steps=8, every=2))
    whole = run(masks, tmp_path / "whole", config)

    class StopRunError(Exception):
        pass

    for number in (3, 10):  # in the head's fit, and after it
        steps = 0

        def advance(progress: Progress, number: int = number) -> None:
            nonlocal steps
            steps += 1
            if steps == number:
                raise StopRunError

        with pytest.raises(StopRunError):
            run(masks, tmp_path / "parts", config, advance=advance)
    parts = run(masks, tmp_path / "parts", config)
    assert (parts.score, parts.frozen) == (whole.score, whole.frozen)
    for name in ("head.safetensors", "lora/adapter_model.safetensors"):
        ours, theirs = (load_file(tmp_path / run / name) for run in ("parts", "whole"))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_features_are_shared_and_settings_kept(masks: Path, tmp_path: Path) -> None:
    run(masks, tmp_path / "one", features=tmp_path / "features")
    rows = len(list((tmp_path / "features").glob("_versions/*")))
    run(masks, tmp_path / "two", replace(SHORT, seed=1), features=tmp_path / "features")
    assert len(list((tmp_path / "features").glob("_versions/*"))) == rows
    with pytest.raises(InputError, match="seed: 0 before, 1 now"):
        run(masks, tmp_path / "one", replace(SHORT, seed=1))
    knn = replace(SHORT, head=HeadConfig(kind="knn"))
    run(masks, tmp_path / "knn", knn, features=tmp_path / "features")
    with pytest.raises(InputError, match=r"head\.neighbours: 20 before, 5 now"):
        run(masks, tmp_path / "knn", replace(SHORT, head=HeadConfig(kind="knn", neighbours=5)))


def test_faults(masks: Path, depths: Path, tmp_path: Path) -> None:
    (masks / "images" / "1.png").write_bytes((masks / "images" / "1.png").read_bytes()[:200])
    with pytest.raises(InputError, match=r"1\.png"):
        run(masks, tmp_path / "out")
    with pytest.raises(InputError, match="nothing to be trained"):
        run(masks, tmp_path / "knn", replace(SHORT, head=HeadConfig(kind="knn"), tune=TuneConfig(kind="lora")))
    task = Task(kind="depth", depth_unit=0.001, most_depth=9.0)
    with pytest.raises(InputError, match="classes, not depth"):
        run(depths, tmp_path / "knn-depth", replace(SHORT, task=task, head=HeadConfig(kind="knn")))
    with pytest.raises(InputError, match="no folder"):
        run(tmp_path / "nothing", tmp_path / "out")
