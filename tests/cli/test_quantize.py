from __future__ import annotations

from densedino.cli.main import main


def test_too_few_images_leave_nothing(photos, tmp_path, capsys) -> None:
    path = tmp_path / "x.safetensors"
    arguments = ["--weights", "random", "--calibrate", str(photos), "-o", str(path), "--size", "32"]
    assert main(["quantize", "debug_vit", *arguments]) == 2
    assert "at least 8" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
