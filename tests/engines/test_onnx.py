from __future__ import annotations

import pytest
import torch

from densedino.engines.eager import EagerEngine
from densedino.engines.graph import Graph
from densedino.engines.onnx import OnnxSession, onnx_engine, write_onnx
from densedino.errors import InputError


@pytest.mark.parametrize("name", ["debug_vit_swiglu", "debug_convnext"])
def test_tokens_are_those_of_eager_at_any_size(lively, name) -> None:
    model = lively(name)
    exact = EagerEngine(model, device=torch.device("cpu"), precision="fp32")
    engine = onnx_engine(model, device=torch.device("cpu"))
    for batch, rows, columns in ((1, 1, 1), (3, 4, 2), (1, 2, 7)):
        image = torch.randn(batch, 3, rows * model.stride, columns * model.stride)
        for got, want in zip(engine(image, layers=(-1, 0)), exact(image, layers=(-1, 0)), strict=True):
            assert got.patches.shape == want.patches.shape
            torch.testing.assert_close(got.patches, want.patches, atol=2e-5, rtol=0)
            torch.testing.assert_close(got.cls, want.cls, atol=2e-5, rtol=0)


def test_a_file_has_one_input_named_outputs_and_metadata(lively, tmp_path) -> None:
    write_onnx(Graph(lively("debug_vit")), tmp_path / "x.onnx", metadata={"licence": "Apache-2.0"})
    session = OnnxSession(tmp_path / "x.onnx")
    assert list(session.inputs) == ["image"]
    assert session.inputs["image"][1] == 3
    assert session.outputs == ["cls", "registers", "patches"]
    import onnx

    assert {p.key: p.value for p in onnx.load(tmp_path / "x.onnx").metadata_props}["licence"] == "Apache-2.0"
    assert [path.name for path in tmp_path.iterdir()] == ["x.onnx"]


def test_a_device_that_is_not_there_is_refused(lively) -> None:
    with pytest.raises(InputError, match=r"CPUExecutionProvider.*device='cpu'"):
        onnx_engine(lively("debug_vit"), device=torch.device("mps"))
