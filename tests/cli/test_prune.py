from __future__ import annotations

import numpy as np
from PIL import Image

import densedino as dd
from densedino.cli.main import main


def test_weights_and_images_in_a_smaller_model_out(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    rng = np.random.default_rng(0)
    for i in range(9):
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(tmp_path / "photos" / f"{i}.png")
    options = "--weights random --calibrate photos --keep 0.8 --minutes 0 --size 32 --images 8 --pictures both.png"
    assert main(["prune", "debug_vit", *options.split()]) == 0
    said = capsys.readouterr().out
    assert "wrote debug_vit-pruned.safetensors" in said
    assert "of the original's multiplications at 32 pixels" in said and "cosine mean" in said
    assert dd.load(weights="debug_vit-pruned.safetensors").model.spec.pruned
    assert (tmp_path / "both.png").exists()
    assert main(["prune", "debug_vit", *options.split()]) == 2
    assert "nothing is overwritten" in capsys.readouterr().err
