from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from densedino.engines import paged
from densedino.engines.paged import page
from densedino.weights.files import read_checkpoint
from densedino.weights.stored import locate

if TYPE_CHECKING:
    from pathlib import Path


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((1,), 2.0))
        self.layers = nn.Sequential(nn.Linear(64, 128), nn.BatchNorm1d(128), nn.Linear(128, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[1] != 64:
            raise ValueError(x.shape)
        return self.layers(x) * self.scale


@pytest.fixture
def paged_net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[_Net, _Net, dict]:
    monkeypatch.setattr(paged, "_SMALL", 4096)
    torch.manual_seed(0)
    whole = _Net().eval()
    state = {k: v.bfloat16() if k == "layers.0.weight" else v for k, v in whole.state_dict().items()}
    save_file(state, tmp_path / "net.safetensors")
    whole.layers[0].weight.data = state["layers.0.weight"].float()
    with torch.device("meta"):
        lean = _Net().eval()
    stored = locate({k: (v,) for k, v in read_checkpoint(tmp_path / "net.safetensors").state.items()})
    page(lean, stored)
    return whole, lean, stored


def test_answers_are_the_same_and_large_tensors_are_not_held(paged_net: tuple[_Net, _Net, dict]) -> None:
    whole, lean, stored = paged_net
    assert stored["layers.0.weight"].pieces[0].path, "in the file, not in memory"
    x = torch.randn(4, 64)
    for _ in range(2):
        assert torch.equal(lean(x), whole(x))
        held = {name for name, value in lean.named_parameters() if not value.is_meta}
        assert held == {name for name, _ in whole.named_parameters()} - {"layers.0.weight"}


def test_a_layer_that_fails_holds_nothing_either(paged_net: tuple[_Net, _Net, dict]) -> None:
    _, lean, _ = paged_net
    with pytest.raises(RuntimeError):
        lean.layers[0](torch.randn(2, 5))
    assert lean.layers[0].weight.is_meta
