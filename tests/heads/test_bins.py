from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from densedino.heads.bins import Bins, bin_centres, depth_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from heads.conftest import Golden

RANGES = [Bins(most=100.0), Bins(most=10.0, spacing="log"), Bins(most=96.0, spacing="mixlog")]


def test_the_released_canopy_bins(golden: Callable[[str], Golden]) -> None:
    released = golden("chmv2")["mid/bins_released_256"]
    assert torch.allclose(bin_centres(RANGES[2], released), released, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("bins", RANGES, ids=lambda bins: bins.spacing)
def test_centres_rise_from_end_to_end(bins: Bins) -> None:
    centres = bin_centres(bins, torch.zeros(1))
    assert (centres.diff() > 0).all() and len(centres) == bins.number
    unit = 8 if bins.spacing == "mixlog" else 1
    assert centres[0] == pytest.approx(bins.least, rel=1e-5) and centres[-1] == pytest.approx(
        bins.most / unit, rel=1e-5
    )


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(RANGES), st.floats(-50, 50), st.floats(0.01, 40), st.integers(0, 2**31))
def test_depth_stays_in_the_range(bins: Bins, shift: float, spread: float, seed: int) -> None:
    logits = torch.randn(1, bins.number, 2, 3, generator=torch.Generator().manual_seed(seed)) * spread + shift
    depth = depth_of(logits, bins)
    assert depth.shape == (1, 1, 2, 3) and depth.isfinite().all()
    assert (depth >= bins.least * 0.99).all() and (depth <= bins.most * 1.001).all()


@pytest.mark.parametrize("bins", RANGES, ids=lambda bins: bins.spacing)
def test_one_logit_far_above_the_rest_picks_its_bin(bins: Bins) -> None:
    logits = torch.full((1, bins.number, 1, 1), -1.0)
    logits[0, 200] = 1e6
    unit = 8 if bins.spacing == "mixlog" else 1
    assert depth_of(logits, bins).item() == pytest.approx(unit * bin_centres(bins, logits)[200].item(), rel=1e-2)


def test_without_a_positive_logit_canopy_height_is_the_mean_of_the_bins() -> None:
    logits = torch.full((1, 256, 1, 1), -3.0)
    assert depth_of(logits, RANGES[2]).item() == pytest.approx(
        8 * bin_centres(RANGES[2], logits).mean().item(), rel=1e-4
    )


def test_a_single_bin_is_the_depth_itself() -> None:
    assert depth_of(torch.tensor([-1.0, 2.0]).reshape(2, 1, 1, 1), RANGES[0]).flatten().tolist() == pytest.approx(
        [1e-3, 2.001]
    )
