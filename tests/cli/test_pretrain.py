from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import densedino as dd
from densedino.cli.main import main


@pytest.fixture
def photo_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Eight small pictures in classes/a and classes/b, and the same as images with masks."""
    monkeypatch.chdir(tmp_path)
    for number in range(8):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 48, 3), dtype=np.uint8)
        for path in (f"classes/{'ab'[number % 2]}/{number}.png", f"scenes/images/{number}.png"):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
        Path("scenes/masks").mkdir(exist_ok=True)
        Image.fromarray(pixels[:, :, 0] // 128).save(f"scenes/masks/{number}.png")
    return tmp_path


QUICK = ["--recipe", "debug", "--steps", "6", "--batch-size", "4", "--workers", "0", "--set", "monitor.size=32"]


def test_the_whole_course_by_command_ends_in_weights_that_load(
    photo_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labelled = ["--labelled", "classes", "--labelled", "scenes"]
    assert main(["pretrain", "classes", *QUICK, *labelled]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("run/model.safetensors: 6 steps done.")
    assert "densedino extract photos/ --weights run/model.safetensors" in out
    assert "stage 3    highres: 2 steps of 4 images" in err
    assert "progress   step 6 of 6 (highres), loss" in err
    assert dd.load(weights="run/model.safetensors").card.data == "classes (8 pictures)"
    config = json.loads(Path("run/config.json").read_text())
    assert (config["monitor"]["knn"], config["monitor"]["segmentation"]) == ("classes", "scenes")
    assert config["precision"] == "fp32"
    look = json.loads(Path("run/looks/step-00000006.json").read_text())
    assert {"knn", "miou"} <= look["measures"].keys()

    assert main(["pretrain", "classes", *QUICK, *labelled]) == 0
    assert "goes on after step 6 of 6" in capsys.readouterr().err
    assert main(["pretrain", "classes", *QUICK, "--seed", "1"]) == 2
    assert "seed: 0 before, 1 now" in capsys.readouterr().err


def test_a_plan_changes_nothing(photo_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", "classes", *QUICK, "--plan", "--set", "gram.losses.gram.weight.end=3"]) == 0
    out, err = capsys.readouterr()
    assert re.search(r"Gram weight (0 → )?3,", out)
    assert "takes      about" in out
    assert err == ""
    assert not Path("run").exists()


def test_without_a_recipe_it_goes_by_the_number_of_pictures(
    photo_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pretrain", "classes", "--plan", "--steps", "100", "--model", "vitt16"]) == 0
    out, err = capsys.readouterr()
    assert err.startswith("recipe     vitt16_small, ViT-Ti/16")
    assert err.endswith("(as no --recipe is given, for 8 pictures)\n")
    assert "vitt16, 5.5 M parameters" in out


def test_given_weights_are_gone_on_from(photo_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", "classes", *QUICK, "-o", "first"]) == 0
    weights = "first/model.safetensors"
    assert main(["pretrain", "classes", "--weights", weights, "--steps", "4", "--batch-size", "4", "--plan"]) == 0
    out, err = capsys.readouterr()
    assert f"recipe     going on from {weights}" in err
    assert f"starts from {weights}" in out
    assert "backbone frozen for 1 steps" in out
    assert main(["pretrain", "classes", *QUICK, "--weights", weights, "-o", "second"]) == 0
    assert any("started from debug_vit" in note for note in dd.load(weights="second/model.safetensors").card.notes)


def test_other_channels_are_measured_once(photo_folder: Path) -> None:
    bands = np.random.default_rng(0).integers(0, 4096, (4, 32, 32, 5), dtype=np.uint16)
    np.save("bands.npy", bands)
    command = ["pretrain", "bands.npy", *QUICK, "--in-chans", "5", "--rgb", "3", "2", "1", "--max-value", "4095"]
    assert main(command) == 0
    card = dd.load(weights="run/model.safetensors").card
    assert card.in_chans == 5
    assert all(abs(mean - 0.5) < 0.02 for mean in card.mean)
    np.save("bands.npy", np.concatenate([bands, 0 * bands]))
    assert main(command) == 0, "the statistics are those of the run, though pictures came to it"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "no data: densedino pretrain photos/"),
        (["no/such/folder"], "no/such/folder"),
        (["classes", "--recipe", "vitt16_smal"], "unknown recipe 'vitt16_smal'; did you mean 'vitt16_small'?"),
        (["classes", "--model", "vitt17"], "unknown model 'vitt17'"),
        (["classes", "--model", "convnext_tiny"], "there is no recipe for 'convnext_tiny' as it is"),
        (["classes", *QUICK, "--set", "pretrain.stepz=3"], "unknown field 'stepz'; did you mean 'steps'?"),
        (["classes", *QUICK, "--set", "highres.batch_size=0"], "batch_size is 0"),
        (
            ["classes", *QUICK, "--set", "gram.start=random", "--set", "pretrain.start=previous"],
            "no stage comes before",
        ),
        (["classes", *QUICK, "--labelled", "nowhere"], "--labelled nowhere"),
        (["classes", *QUICK, "--weights", "missing.pth"], "missing.pth"),
        (["classes", *QUICK, "--steps", "2"], "2 steps for 3 stages"),
        (["classes", *QUICK, "--device", "cuda:9"], "device 'cuda:9' is not there"),
    ],
)
def test_mistakes_are_one_error_before_anything_is_done(
    photo_folder: Path, capsys: pytest.CaptureFixture[str], args: list[str], message: str
) -> None:
    assert main(["pretrain", *args]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err
    assert not Path("run").exists()
