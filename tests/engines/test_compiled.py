from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from densedino.engines.compiled import compiled_engine
from densedino.engines.eager import EagerEngine

CPU = torch.device("cpu")


def test_the_graph_runs_through_torch_compile(lively, monkeypatch) -> None:
    """With a backend that generates no code: what is ours is tested in seconds."""
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module, *, dynamic: compiled(module, dynamic=dynamic, backend="eager"))
    model = lively("debug_vit")
    exact = EagerEngine(model, device=CPU, precision="fp32")
    for precision, least in (("fp32", 0.99999), ("bf16", 0.999)):
        engine = compiled_engine(model, precision=precision, device=CPU)
        for shape in ((2, 3, 64, 96), (1, 3, 32, 16)):
            image = torch.randn(shape)
            got, want = engine(image)[0].patches, exact(image)[0].patches
            assert got.dtype == torch.float32
            assert F.cosine_similarity(got, want, dim=-1).min() > least


@pytest.mark.slow
def test_inductor_gives_the_same_tokens_at_any_size(lively) -> None:
    model = lively("debug_convnext")
    exact, engine = (
        EagerEngine(model, device=CPU, precision="fp32"),
        compiled_engine(model, precision="fp32", device=CPU),
    )
    for shape in ((2, 3, 64, 96), (1, 3, 32, 160)):
        image = torch.randn(shape)
        torch.testing.assert_close(engine(image)[0].patches, exact(image)[0].patches, atol=2e-5, rtol=0)
