from __future__ import annotations

import os
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from densedino.errors import WeightsError
from densedino.weights.stored import locate

TENSORS = {
    "a": torch.randn(7, 300),
    "b": torch.randn(1000, 400).bfloat16(),
    "odd": torch.arange(5, dtype=torch.uint8),
    "scalar": torch.tensor(3.0),
}


def opened(path):
    save_file(TENSORS, path)
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


@pytest.mark.skipif(sys.platform != "linux", reason="where a mapping lies is known on Linux only")
@pytest.mark.parametrize("kind", ["safetensors", "torch"])
def test_mapped_tensors_are_read_from_their_file(tmp_path, kind):
    path = tmp_path / "x"
    if kind == "safetensors":
        tensors = opened(path)
    else:
        torch.save(TENSORS, path)
        tensors = torch.load(path, mmap=True, weights_only=True)
    for key, stored in locate({key: (value,) for key, value in tensors.items()}).items():
        (piece,) = stored.pieces
        assert piece.path == str(path)
        out = torch.zeros_like(TENSORS[key])
        stored.read(out)
        assert torch.equal(out, TENSORS[key])


def test_reading_converts_and_joins(tmp_path):
    tensors = opened(tmp_path / "x")
    memory = torch.randn(2, 300)
    stored = locate({"a": (tensors["a"], memory)})["a"]
    out = torch.zeros(9, 300, dtype=torch.bfloat16)
    stored.read(out)
    assert torch.equal(out, torch.cat([TENSORS["a"], memory]).bfloat16())
    assert stored.nbytes == 9 * 300 * 4
    out = torch.zeros(1000, 400)
    locate({"b": (tensors["b"],)})["b"].read(out)
    assert torch.equal(out, TENSORS["b"].float())


def test_what_is_in_no_file_or_not_in_one_piece_is_taken_from_memory(tmp_path):
    tensors = opened(tmp_path / "x")
    for tensor in (torch.randn(3, 4), tensors["a"].t(), tensors["a"][:, ::2]):
        stored = locate({"x": (tensor,)})["x"]
        assert not stored.pieces[0].path
        out = torch.zeros(tensor.shape)
        stored.read(out)
        assert torch.equal(out, tensor)


def test_a_file_that_changes_meanwhile_is_an_error(tmp_path):
    path = tmp_path / "x"
    stored = locate({"b": (opened(path)["b"],)})["b"]
    if not stored.pieces[0].path:
        pytest.skip("taken from the mapping on this system")
    out = torch.zeros(1000, 400, dtype=torch.bfloat16)
    os.truncate(path, 1000)
    with pytest.raises(WeightsError, match="cut off"):
        stored.read(out)
    save_file(TENSORS, tmp_path / "y")
    (tmp_path / "y").replace(path)
    with pytest.raises(WeightsError, match="replaced"):
        stored.read(out)
