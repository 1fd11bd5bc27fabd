from __future__ import annotations

import json

from densedino.cli.main import main


def test_two_ways_are_compared(photos, tmp_path, capsys) -> None:
    numbers, pictures = tmp_path / "f.json", tmp_path / "f.png"
    ways = ["eager:fp32", "eager:bf16"]
    status = main(["fidelity", *ways, str(photos), "--weights", "debug_vit", "--resize", "64"])
    assert status == 2, "there are no weights of debug_vit"
    assert "weights='random'" in capsys.readouterr().err
    weights = tmp_path / "w.safetensors"
    assert main(["weights", "convert", "random", "--name", "debug_vit", "--to", "densedino", "-o", str(weights)]) == 0
    arguments = ["--resize", "64", "--json", str(numbers), "--pictures", str(pictures)]
    assert main(["fidelity", str(weights), f"{weights}@eager:bf16", str(photos), *arguments]) == 0
    out = capsys.readouterr().out
    assert "debug_vit, eager, bf16" in out
    assert "times as fast" in out
    assert json.loads(numbers.read_text())["images"] == 4
    assert pictures.exists()


def test_how_without_what_is_an_error(photos, capsys) -> None:
    assert main(["fidelity", "eager:fp32", "openvino", str(photos)]) == 2
    assert "give --weights" in capsys.readouterr().err
