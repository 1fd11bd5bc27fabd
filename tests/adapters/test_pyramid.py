"""Heads of four scales."""

from __future__ import annotations

import pytest
import torch

from densedino.adapters.pyramid import AdapterHead, DptHead, LevelHead, _averages
from densedino.engines.eager import LayerTokens


@pytest.mark.parametrize("pools", [False, True])
def test_every_level_counts(pools: bool) -> None:
    torch.manual_seed(0)
    head = LevelHead([8, 12, 16, 24], width=16, out=3, pools=pools).eval()
    maps = [torch.randn(1, d, 16 // s, 24 // s) for d, s in ((8, 1), (12, 2), (16, 4), (24, 8))]
    whole = head(maps)
    assert whole.shape == (1, 3, 16, 24)
    for i in range(4):
        others = [m if j != i else torch.zeros_like(m) for j, m in enumerate(maps)]
        assert (head(others) - whole).abs().max() > 1e-4


def test_released_modules_small() -> None:
    torch.manual_seed(0)
    taps = [LayerTokens(torch.randn(1, 3, 5, 64), torch.randn(1, 64), torch.zeros(1, 0, 64)) for _ in range(4)]
    assert DptHead(64, width=16, out=7).eval()(taps).shape == (1, 7, 64, 96)  # odd grids are stretched
    head = AdapterHead(64, width=16, out=7).eval()
    assert head(taps, torch.randn(1, 3, 48, 80)).shape == (1, 7, 12, 20)  # continued to 64×96, and cut again


@pytest.mark.parametrize("bins", [1, 2, 3, 6])
def test_pooling_is_pytorchs(bins: int) -> None:
    x = torch.randn(2, 3, 7, 10, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(_averages(x, bins), torch.nn.functional.adaptive_avg_pool2d(x, bins))
