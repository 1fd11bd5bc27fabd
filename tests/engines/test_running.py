from __future__ import annotations

import pytest
import torch

from densedino.engines.graph import Graph
from densedino.engines.running import GraphEngine, float32
from densedino.errors import InputError


@pytest.fixture
def counted(lively):
    """An engine that runs the graph as it is, and the sessions that it asked for."""
    model = lively("debug_vit")
    built = []

    def build(layers, norm):
        built.append((layers, norm))
        graph = Graph(model, layers=layers, norms=(norm,))
        return lambda image: graph(image)

    return GraphEngine(model, build, name="test", precision="fp32", device=torch.device("cpu")), built


def test_layers_come_in_the_order_asked_from_one_session(counted) -> None:
    engine, built = counted
    image = torch.randn(1, 3, 32, 48)
    last, first, again = engine(image, layers=(-1, 0, 1))
    assert built == [((0, 1), True)]
    assert last.patches.shape == (1, 2, 3, 32)
    assert torch.equal(last.cls, again.cls)
    assert not torch.equal(last.cls, first.cls)
    engine(image, layers=(0, 1))
    assert len(built) == 1


def test_changed_weights_are_compiled_anew(counted) -> None:
    engine, built = counted
    image = torch.randn(1, 3, 32, 48)
    engine(image)
    with torch.no_grad():
        engine.model.blocks[0].ls1.gamma.zero_()
    engine(image)
    assert len(built) == 2


def test_sessions_are_not_kept_for_ever(counted) -> None:
    engine, built = counted
    for layers in ((0,), (1,), (0, 1)) * 2:
        for norm in (True, False):
            engine(torch.randn(1, 3, 16, 16), layers=layers, norm=norm)
    assert len(built) == 6
    assert len(engine._sessions) <= 8


def test_wrong_input_is_refused_in_our_words(counted) -> None:
    engine, _ = counted
    for shape in ((3, 32, 32), (1, 4, 32, 32), (0, 3, 32, 32)):
        with pytest.raises(InputError, match=r"takes \[B, 3, H, W\]"):
            engine(torch.zeros(shape))
    with pytest.raises(InputError, match="multiples of 16"):
        engine(torch.zeros(1, 3, 40, 32))
    with pytest.raises(InputError, match="block indices"):
        engine(torch.zeros(1, 3, 32, 32), layers=(7,))
    engine.model.train()
    with pytest.raises(InputError, match="training mode"):
        engine(torch.zeros(1, 3, 32, 32))


def test_float32_copies_only_what_is_not(lively) -> None:
    model = lively("debug_vit")
    assert float32(model) is model
    half = lively("debug_vit").to(torch.bfloat16)
    assert next(float32(half).parameters()).dtype == torch.float32
    assert next(half.parameters()).dtype == torch.bfloat16
