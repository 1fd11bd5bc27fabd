from __future__ import annotations

import pytest
import torch

import densedino as dd
from densedino.engines.quantized import read_quantized
from densedino.errors import InputError
from densedino.features.quantizing import quantize


def test_a_quantised_file_is_loaded_like_any_weights(tmp_path, images) -> None:
    path = tmp_path / "small.safetensors"
    done = quantize("debug_vit", weights="random", images=images, output=path, size=48, most=8)
    assert done.calibrated == 8
    assert done.fidelity.images == 4, "the report is on those that were not seen"
    assert done.fidelity.tokens.mean > 0.99
    assert done.fidelity.bytes_b < done.fidelity.bytes_a
    assert read_quantized(path).report["tokens"]["mean"] == done.fidelity.tokens.mean
    dino = dd.load(weights=path)
    assert (dino.engine.name, dino.precision) == ("openvino", "int8")
    assert "int8" in dino.engine_reason
    image = torch.rand(3, 64, 48)
    assert torch.equal(dino(image).patches, dd.load("debug_vit", weights=path)(image).patches)
    assert dino.fingerprint != dd.load("debug_vit", weights="random", device="cpu").fingerprint
    with pytest.raises(InputError, match="Leave them out"):
        dd.load(weights=path, engine="eager")
    with pytest.raises(InputError, match="is debug_vit"):
        dd.load("vits16", weights=path)


def test_nothing_is_begun_that_cannot_be_written(tmp_path, images) -> None:
    with pytest.raises(InputError, match=r"\.safetensors"):
        quantize("debug_vit", weights="random", images=images, output=tmp_path / "x.onnx")
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match="no pictures"):
        quantize("debug_vit", weights="random", images=tmp_path / "none", output=tmp_path / "x.safetensors")
