from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from densedino.pretrain.masking import block_mask, draw_masks, masked_counts


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 20), st.integers(1, 20), st.floats(0, 1), st.integers(0, 2**31))
def test_block_mask_has_exactly_the_count(h, w, share, seed):
    count = int(share * h * w)
    assert block_mask((h, w), count, rng=np.random.default_rng(seed)).sum() == count


def test_blocks_are_blocks():
    """A masked patch's right neighbour is masked far more often than in a mask of single patches (share 0.5)."""
    rng = np.random.default_rng(0)
    masks = np.stack([block_mask((14, 14), 98, rng=rng) for _ in range(50)])
    both = (masks[:, :, 1:] & masks[:, :, :-1]).sum() / masks[:, :, :-1].sum()
    assert both > 0.7


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 12), st.integers(1, 3), st.integers(0, 9), st.booleans())
def test_the_plan_is_exact(batch_size, num_crops, seed, shift):
    masks = draw_masks(
        (6, 7), batch_size=batch_size, num_crops=num_crops, seed=seed, step=3, circular_shift=shift
    ).flatten(0, 1)
    counts = sorted(c for c in masks.sum(1).tolist() if c)
    assert counts == masked_counts(42, crops=num_crops * batch_size // 2, ratio=(0.1, 0.5))


def test_counts_climb_evenly_to_the_upper_ratio():
    assert masked_counts(196, crops=4, ratio=(0.1, 0.5)) == [39, 58, 78, 98]
    assert masked_counts(100, crops=2, ratio=(0.1, 0.5)) == [30, 50]
    assert masked_counts(196, crops=0, ratio=(0.1, 0.5)) == []


def test_masks_depend_on_seed_and_step_and_place_only():
    def draw(**changes):
        return draw_masks((8, 8), **{"batch_size": 8, "seed": 1, "step": 2, **changes})

    whole = draw()
    assert torch.equal(whole, draw())
    assert not torch.equal(whole, draw(step=3))
    assert not torch.equal(whole, draw(seed=2))
    halves = [draw(samples=range(3)), draw(samples=range(3, 8))]  # as two processes would draw them
    assert torch.equal(whole, torch.cat(halves, dim=1))


def test_circular_shift_masks_borders_as_often_as_the_centre():
    def border_share(shift):
        steps = [draw_masks((14, 14), batch_size=8, seed=0, step=s, circular_shift=shift) for s in range(60)]
        rate = torch.cat(steps).float().mean((0, 1)).view(14, 14)
        return (rate[0].mean() / rate[5:9, 5:9].mean()).item()

    assert border_share(False) < 0.8
    assert 0.85 < border_share(True) < 1.15
