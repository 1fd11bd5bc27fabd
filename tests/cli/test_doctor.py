"""`densedino doctor`: what it prints, and its exit status."""

import json

import pytest

from densedino.cli.main import main
from densedino.features import machine, selftest


@pytest.fixture
def _fast(monkeypatch):
    monkeypatch.setattr(selftest, "GOLDEN_MODELS", ("debug_vit", "debug_convnext"))


@pytest.mark.usefixtures("_fast")
def test_a_healthy_machine(capsys):
    assert main(["doctor", "--quick"]) == 0
    out = capsys.readouterr().out
    for word in ("PyTorch", "CPU", "Optional parts", "video", "interop", "parity of debug_vit", "Nothing failed"):
        assert word in out


@pytest.mark.usefixtures("_fast")
def test_a_failure_is_exit_status_1_and_names_its_fix(capsys, monkeypatch):
    monkeypatch.setattr(selftest, "TOLERANCE", 0.0)
    assert main(["doctor", "--quick"]) == 1
    out = capsys.readouterr().out
    assert "failed" in out and "Fix: reinstall PyTorch" in out and "2 of 4 checks failed" in out


@pytest.mark.usefixtures("_fast")
def test_json_is_one_object_on_stdout(capsys):
    assert main(["doctor", "--quick", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["healthy"] is True and report["speed"] is None
    assert {check["status"] for check in report["checks"]} <= {"ok", "warning"}
    assert set(report["extras"]) == {extra.name for extra in machine.EXTRAS}
    assert report["environment"]["PyTorch"]


@pytest.mark.usefixtures("_fast")
def test_weights_that_cannot_be_read_are_a_failure_in_the_report(capsys, tmp_path):
    (tmp_path / "w.pth").write_bytes(b"<html>")
    assert main(["doctor", "--quick", "--json", "--weights", str(tmp_path / "w.pth")]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["healthy"] is False and report["checks"][-1]["status"] == "failed"


def test_an_image_without_weights_is_refused(capsys):
    assert main(["doctor", "--image", "a.jpg"]) == 2
    assert "--weights" in capsys.readouterr().err


@pytest.mark.usefixtures("_fast")
def test_missing_extras_name_the_command(capsys, monkeypatch):
    monkeypatch.setattr(machine, "_version", lambda package: None if package in ("av", "timm") else "1.0")
    assert main(["doctor", "--quick"]) == 0
    out = capsys.readouterr().out
    assert "pip install 'densedino[video]'" in out and "for timm: pip install 'densedino[interop]'" in out


@pytest.mark.slow
def test_speed_is_measured_in_seconds(capsys):
    assert main(["doctor", "--json"]) == 0
    speed = json.loads(capsys.readouterr().out)["speed"]
    assert speed["images_per_second"] > 0.2 and speed["matmul_gflops"]["fp32"] > 1
