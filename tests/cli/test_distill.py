from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

import densedino as dd
from densedino.cli.main import main
from densedino.models.catalog import create_model
from densedino.weights.convert import write_weights
from densedino.weights.loading import load_weights


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(4):
        Image.fromarray(rng.integers(0, 256, (70, 90, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    path = tmp_path_factory.mktemp("teacher") / "t.safetensors"
    _, card = load_weights("debug_vit", weights="random")
    model = create_model("debug_vit")
    write_weights(model.state_dict(), path, card=card)
    return path


def test_distils_features_and_goes_on(photos, teacher, tmp_path, capsys):
    command = [
        "distill", str(photos), "--teacher", str(teacher), "--student", "debug_convnext", "-o", str(tmp_path / "out"),
        "--size", "64", "--steps", "3", "--batch-size", "2", "--workers", "0", "--device", "cpu", "--cached",
        "--set", "calibration=4",
    ]  # fmt: skip
    assert main(command) == 0
    shown = capsys.readouterr()
    assert "step 3 of 3, loss of student" in shown.err
    assert "debug_convnext.safetensors: 3 steps done." in shown.out
    loaded = dd.load(weights=tmp_path / "out" / "debug_convnext.safetensors")
    assert "headless distillation from debug_vit" in loaded.card.notes[0]
    assert main(command) == 0
    assert "goes on after step 3 of 3" in capsys.readouterr().err
    assert main([*command, "--seed", "1"]) == 2
    assert "seed: 0 before, 1 now" in capsys.readouterr().err


def test_says_what_is_missing_or_does_not_go_together(photos, teacher, capsys):
    assert main(["distill", str(photos)]) == 2
    assert "--teacher weights.pth" in capsys.readouterr().err
    both = ["--student", "debug_vit", "--student", "debug_convnext"]
    assert main(["distill", str(photos), "--teacher", str(teacher), *both]) == 2
    assert "one after the other" in capsys.readouterr().err


def test_distils_a_run_into_two_students(photos, tmp_path, capsys):
    pretrain = [
        "pretrain", str(photos), "--recipe", "debug", "-o", str(tmp_path / "run"), "--steps", "3", "--batch-size", "2",
        "--workers", "0", "--device", "cpu", "--set", "monitor.images=4", "--set", "monitor.tensorboard=false",
    ]  # fmt: skip
    assert main(pretrain) == 0
    command = [
        "distill", str(photos), "--teacher", str(tmp_path / "run"), "--student", "debug_vit", "--student",
        "debug_convnext", "-o", str(tmp_path / "out"), "--steps", "2", "--batch-size", "2", "--workers", "0",
        "--device", "cpu",
    ]  # fmt: skip
    capsys.readouterr()
    assert main(command) == 0
    assert "debug_vit.safetensors: 2 steps" in capsys.readouterr().out
    assert dd.load(weights=tmp_path / "out" / "debug_convnext.safetensors").card.model == "debug_convnext"
    assert main([*command, "--teacher", "other.pth"]) == 2
    assert "teach alone" in capsys.readouterr().err
