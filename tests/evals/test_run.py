"""Whole evaluations: the same figures every time, resumed or not, and again by --reproduce."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from densedino.cli.main import main
from densedino.errors import InputError
from densedino.evals import run as running
from densedino.evals.metrics import count_classes, iou_of
from densedino.evals.pixel_probe import Fitting
from densedino.evals.plan import Plan, read_plan
from densedino.evals.run import evaluate
from densedino.evals.segmentation import Settings
from densedino.features.store import FeatureStore

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore::densedino.errors.UntrainedWarning")


def plan_of(data: Path, output: Path, **changes: Any) -> Plan:
    quick = Settings(fitting=Fitting(steps=60, batch=4), memory=400, neighbours=5)
    given = {"models": ("raw", "debug_vit:random"), "seeds": 3, "settings": quick} | changes
    return Plan(protocol="segmentation", data=data, output=output, **given)


def test_a_run_is_equal_to_one_that_was_stopped_and_went_on(
    mask_folder: Path, tmp_path: Path, silent: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluate(plan_of(mask_folder, tmp_path / "whole"), narrator=silent, workers=0)
    original, done = running.run_job, []

    def stopping(job: running.Job) -> float:
        if len(done) == 5:
            raise KeyboardInterrupt
        done.append(job)
        return original(job)

    monkeypatch.setattr(running, "run_job", stopping)
    with pytest.raises(KeyboardInterrupt):
        evaluate(plan_of(mask_folder, tmp_path / "parts"), narrator=silent, workers=0)
    assert not (tmp_path / "parts" / "results.json").exists()
    monkeypatch.setattr(running, "run_job", original)
    evaluate(plan_of(mask_folder, tmp_path / "parts"), narrator=silent, workers=0)
    assert (tmp_path / "parts" / "results.json").read_bytes() == (tmp_path / "whole" / "results.json").read_bytes()
    rows = {(row["model"], row["head"]): row for row in whole["rows"]}
    assert len(rows) == 4
    best = rows["raw", "linear"]["metrics"]["miou"]
    assert best["mean"] > 60, "classes are told by colour"
    assert len(best["values"]) == rows["raw", "linear"]["seeds"] == 3
    low, high = best["interval"]
    assert low <= best["mean"] <= high
    assert rows["debug_vit:random", "linear"]["against_first"]["row"] == ["raw", "linear"]


def test_the_folder_says_everything(mask_folder: Path, tmp_path: Path, silent: Any) -> None:
    evaluate(plan_of(mask_folder, tmp_path / "run", models=("raw",), seeds=1), narrator=silent, workers=0)
    run = tmp_path / "run"
    assert {"report.html", "results.json", "config.json", "environment.json", "models.json", "manifest.jsonl"} <= {
        path.name for path in run.iterdir()
    }
    rows = [json.loads(line) for line in (run / "manifest.jsonl").read_text().splitlines()]
    assert len(rows) == 12 and all(len(row["sha256"]) == len(row["target_sha256"]) == 64 for row in rows)
    scores = [json.loads(line) for line in (run / "scores/raw/linear-seed0.jsonl").read_text().splitlines()]
    assert [one["key"] for one in scores] == [f"val/{i}.png" for i in range(4)] and "miou" in scores[0]
    head = load_file(run / "scores/raw/linear-seed0.safetensors")
    with Image.open(mask_folder / "valannot/2.png") as image:
        true = np.array(image)
    features = FeatureStore(run / "features/raw")[str((mask_folder / "val/2.png").resolve())]
    found = (features.upsample((64, 96))[0].permute(1, 2, 0).numpy() @ head["weight"] + head["bias"]).argmax(-1)
    again = iou_of(count_classes(found, true, num_classes=3, ignore=255))
    assert again["miou"] == pytest.approx(scores[2]["miou"], abs=0.1), "by the store and the head alone"
    model = json.loads((run / "models.json").read_text())["raw"]
    assert model["weights"]["licence"] and model["fingerprint"]
    assert "<svg" in (run / "report.html").read_text() and "http" not in (run / "report.html").read_text().split(
        "<pre>"
    )[0].replace("http://www.w3.org/2000/svg", "")


def test_another_plan_or_other_data_are_refused(mask_folder: Path, tmp_path: Path, silent: Any) -> None:
    data = tmp_path / "data"
    shutil.copytree(mask_folder, data)
    plan = plan_of(data, tmp_path / "run", models=("raw",), seeds=1)
    evaluate(plan, narrator=silent, workers=0)
    with pytest.raises(InputError, match=r"holds another evaluation: seeds is 1 there and 2 now"):
        evaluate(replace(plan, seeds=2), narrator=silent, workers=0)
    (data / "train/0.png").write_bytes((data / "train/1.png").read_bytes())
    with pytest.raises(InputError, match=r"the first difference is train/0.png"):
        evaluate(plan, narrator=silent, workers=0)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="holds no evaluation"):
        evaluate(replace(plan, output=tmp_path / "other"), narrator=silent, workers=0)


def test_low_shot_draws_by_seed_and_a_limit_is_kept(class_folder: Path, tmp_path: Path, silent: Any) -> None:
    plan = Plan(
        protocol="knn", data=class_folder, models=("raw",), output=tmp_path / "run", share=0.2, seeds=3, limit=9
    )
    results = evaluate(plan, narrator=silent, workers=0)
    assert (results["data"]["train"], results["data"]["test"]) == (9, 9)
    assert results["rows"][0]["seeds"] == 3 and results["rows"][0]["metrics"]["top1@20"]["mean"] == 100


def test_reproduce_says_which_numbers_match(
    class_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["eval", "knn", "--data", str(class_folder), "--models", "raw", "-o", str(tmp_path / "run")]
    assert main(command) == 0
    assert "top1@20" in capsys.readouterr().out
    assert main(["eval", "--reproduce", str(tmp_path / "run")]) == 0
    assert "numbers match within 0.1; the largest difference is 0" in capsys.readouterr().out
    results = json.loads((tmp_path / "run/results.json").read_text())
    results["rows"][0]["metrics"]["top1@20"]["mean"] = 50.0
    (tmp_path / "run/results.json").write_text(json.dumps(results))
    assert main(["eval", "--reproduce", str(tmp_path / "run")]) == 1
    assert "differs    raw / k-NN / top1@20 / mean: 50.0 there, 100.0 here" in capsys.readouterr().out


def test_a_plan_is_a_python_file(class_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plan.py"
    folders = f"data=Path({str(class_folder)!r}), output=Path({str(tmp_path / 'out')!r})"
    path.write_text(
        "from pathlib import Path\nfrom densedino.evals.plan import Plan\n"
        f"plan = Plan(protocol='knn', models=('raw',), {folders})\n"
    )
    assert read_plan(path).models == ("raw",)
    assert main(["eval", str(path)]) == 0
    assert (tmp_path / "out/results.json").is_file()
    assert main(["eval", "segmentatoin", "--data", str(class_folder)]) == 2
    assert "did you mean 'segmentation'" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_to_the_same_results(mask_folder: Path, tmp_path: Path, silent: Any) -> None:
    """A real process with workers and a real SIGKILL; then without workers, which changes no figure."""
    words = f"eval segmentation --data {mask_folder} --models raw --seeds 3 --workers 2 --set fitting.steps=100"
    command = [sys.executable, "-m", "densedino", *words.split(), "-o", str(tmp_path / "killed")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    while not list((tmp_path / "killed").glob("scores/raw/*.npz")):
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()  # its workers end by themselves
    process.wait()
    assert not (tmp_path / "killed/results.json").exists()
    for output in (tmp_path / "killed", tmp_path / "whole"):
        settings = Settings(fitting=Fitting(steps=100))
        evaluate(plan_of(mask_folder, output, models=("raw",), settings=settings), narrator=silent, workers=0)
    assert (tmp_path / "killed/results.json").read_bytes() == (tmp_path / "whole/results.json").read_bytes()
