"""The self-test passes here, fails when arithmetic or files are wrong, and checks released weights as promised."""

import copy
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

from densedino.features import selftest
from densedino.models.catalog import create_model
from densedino.weights.catalog import SAT493M_STATS

sys.path.insert(0, str(Path(__file__).parent.parent / "parity"))
from oracles import huggingface_vit


def statuses(checks):
    return {check.name: check.status for check in checks}


def test_everything_passes_here():
    checks = selftest.run_checks()
    assert len(checks) > len(selftest.GOLDEN_MODELS)
    assert set(statuses(checks).values()) <= {"ok", "warning"}, checks
    assert all(check.status == "ok" for check in checks if "parity" in check.name)


def test_the_golden_weights_are_exact_multiples_and_matter():
    model = selftest.golden_model("debug_vit")
    for key, parameter in model.named_parameters():
        scaled = parameter.double() * 2.0**30
        assert torch.equal(scaled, scaled.round()), f"{key} is not exact"
        assert parameter.std() > 0.01, f"{key} is too small to be tested"


def wrong_statistics(monkeypatch):
    monkeypatch.setattr(selftest, "IMAGENET_STATS", SAT493M_STATS)


def wrong_rope(monkeypatch):
    original = create_model

    def bent(name):
        model = original(name)
        if hasattr(model, "rope_embed"):
            model.rope_embed.base = 10.0
            model.rope_embed.reset_periods()
        return model

    monkeypatch.setattr(selftest, "create_model", bent)


def wrong_norm(monkeypatch):
    original = create_model

    def bent(name):
        model = original(name)
        for module in model.modules():
            if hasattr(module, "eps"):
                module.eps = 1e-2
        return model

    monkeypatch.setattr(selftest, "create_model", bent)


@pytest.mark.parametrize("fault", [wrong_statistics, wrong_norm])
def test_wrong_arithmetic_is_found_in_every_model(monkeypatch, fault):
    fault(monkeypatch)
    checks = selftest.check_parity()
    assert {check.status for check in checks} == {"failed"}
    assert all("torch" in check.fix for check in checks)


def test_wrong_rotary_positions_are_found_in_every_vit(monkeypatch):
    wrong_rope(monkeypatch)
    found = statuses(selftest.check_parity())
    assert {status for name, status in found.items() if "vit" in name} == {"failed"}


def test_not_a_number_is_a_failure(monkeypatch):
    features = selftest.golden_features("debug_vit")
    features = replace(features, cls=torch.full_like(features.cls, torch.nan))
    monkeypatch.setattr(selftest, "golden_features", lambda name, device: features)
    monkeypatch.setattr(selftest, "GOLDEN_MODELS", ("debug_vit",))
    assert statuses(selftest.check_parity()) == {"parity of debug_vit on cpu": "failed"}


def test_files_that_do_not_belong_together_are_told_from_wrong_arithmetic(monkeypatch):
    numbers = copy.deepcopy(selftest.golden_numbers())
    numbers["vitt16"]["parameters_sha256"] = "0" * 64
    monkeypatch.setattr(selftest, "golden_numbers", lambda: numbers)
    bad = next(check for check in selftest.check_parity() if check.status == "failed")
    assert "vitt16" in bad.name and "reinstall densedino" in bad.fix


def test_the_store_is_written_and_read():
    check = selftest.check_store()
    assert check.status == "ok", check


def test_a_crash_inside_a_check_is_its_failure(monkeypatch):
    def crash(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(selftest, "check_store", crash)
    monkeypatch.setattr(selftest, "golden_features", crash)
    checks = selftest.run_checks()
    failed = [check for check in checks if check.status == "failed"]
    assert len(failed) == len(selftest.GOLDEN_MODELS) + 1
    assert all("OSError: no space left" in check.found and check.fix for check in failed)


def test_other_random_weights_are_a_warning_not_a_failure(monkeypatch):
    numbers = copy.deepcopy(selftest.golden_numbers())
    numbers["debug_vit"]["random_sha256"] = "0" * 64
    monkeypatch.setattr(selftest, "golden_numbers", lambda: numbers)
    check = selftest.check_random_weights()
    assert check.status == "warning" and "debug_vit" in check.found and "another machine" in check.fix


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A file that passes for released ViT-S weights, an image of COCO's size, and what transformers makes of both."""
    from transformers import DINOv3ViTImageProcessor

    folder = tmp_path_factory.mktemp("released")
    torch.manual_seed(3)
    model = create_model("vits16")
    for key, parameter in model.named_parameters():
        if "gamma" in key:
            torch.nn.init.constant_(parameter, 0.1)
    weights = folder / "dinov3_vits16_pretrain_lvd1689m-12345678.pth"
    torch.save(model.state_dict(), weights)
    image = Image.fromarray(data.astronaut()).resize((640, 480))
    image.save(folder / "000000039769.png")
    processor = DINOv3ViTImageProcessor()
    pixels = processor(Image.open(folder / "000000039769.png"), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 224, 224)
    with torch.inference_mode():
        tokens = huggingface_vit(model)(pixels).last_hidden_state[0]
    return weights, folder / "000000039769.png", (tuple(tokens[0, :5].tolist()), tuple(tokens[5, :5].tolist()))


def test_released_weights_are_compared_as_transformers_would(released, monkeypatch):
    weights, image, values = released
    monkeypatch.setitem(selftest.RELEASED, "vits16", values)
    identity, golden = selftest.check_released(weights, image)
    assert identity.status == "ok" and "vits16-lvd1689m" in identity.found
    assert golden.status == "ok", golden


def test_values_that_differ_fail_and_the_fix_names_image_and_checkpoint(released):
    weights, image, _ = released
    golden = selftest.check_released(weights, image)[1]
    assert golden.status == "failed" and "JPEG" in golden.fix and "checkpoint" in golden.fix


def test_another_image_is_told_by_its_size(released, tmp_path):
    Image.fromarray(np.zeros((100, 90, 3), np.uint8)).save(tmp_path / "other.png")
    golden = selftest.check_released(released[0], tmp_path / "other.png")[1]
    assert golden.status == "failed" and "90×100" in golden.found


def test_without_an_image_only_the_identity_is_checked(released):
    identity, golden = selftest.check_released(released[0], None)
    assert (identity.status, golden.status) == ("ok", "skipped") and "--image" in golden.fix


@pytest.mark.parametrize("content", [b"", b"<html>Sign in</html>"])
def test_a_file_that_is_no_checkpoint_is_a_failure_with_the_loader_s_words(tmp_path, content):
    (tmp_path / "w.pth").write_bytes(content)
    (check,) = selftest.check_released(tmp_path / "w.pth", None)
    assert check.status == "failed" and "w.pth" in check.found


def test_weights_without_published_values_are_skipped_not_passed(tmp_path, released):
    path = tmp_path / "dinov3_convnext_tiny_pretrain_lvd1689m-12345678.pth"
    torch.save(create_model("convnext_tiny").state_dict(), path)
    identity, golden = selftest.check_released(path, released[1])
    assert identity.status == "ok" and golden.status == "skipped" and "vits16" in golden.found


def test_the_golden_file_has_what_the_tests_need():
    numbers = selftest.golden_numbers()
    assert tuple(numbers) == selftest.GOLDEN_MODELS
    assert all(len(entry["tokens"]) >= 4 for entry in numbers.values())
    assert len(json.dumps(numbers)) < 20_000
