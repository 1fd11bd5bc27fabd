from __future__ import annotations

import pytest
import torch
from safetensors import safe_open

from densedino.weights.writing import write_tensors


def test_what_is_written_piece_by_piece_is_a_safetensors_file(tmp_path):
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.randn(4, 2).bfloat16(),
        "c": torch.tensor([1, -2], dtype=torch.int8),
        "scalar": torch.tensor(2.0),
        "view": torch.randn(4, 6).t(),
    }
    shapes = {key: (tuple(value.shape), value.dtype) for key, value in tensors.items()}
    write_tensors(tmp_path / "x.safetensors", shapes, iter(tensors.values()), metadata={"x": "y"})
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert file.metadata() == {"x": "y"} and list(file.keys()) == sorted(tensors)
        assert all(torch.equal(file.get_tensor(key), value) for key, value in tensors.items())


def test_nothing_is_left_of_a_file_that_failed(tmp_path):
    shapes = {"a": ((2,), torch.float32), "b": ((2,), torch.float32)}
    for tensors in ([torch.ones(2)], [torch.ones(2), torch.ones(3)]):
        with pytest.raises(ValueError, match=r"announced|shorter"):
            write_tensors(tmp_path / "x.safetensors", shapes, tensors, metadata={})
    assert not list(tmp_path.iterdir())
