from __future__ import annotations

import itertools

import numpy as np
import torch

from densedino.pretrain.randomness import counted_generator, counted_seed


def test_every_counter_is_its_own_stream():
    keys = itertools.product(["crops", "mask"], [0, 1, 12], [0, 1, 2, 112], [0, 1, 2, 21])
    seeds = [counted_seed(p, seed=s, step=t, index=i) for p, s, t, i in keys]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= s < 2**63 for s in seeds)
    torch.Generator().manual_seed(max(seeds))


def test_streams_are_the_same_everywhere_and_for_ever():
    assert counted_seed("crops", seed=1, step=2, index=3) == 630379701249663262
    draws = [counted_generator("crops", seed=1, step=2, index=3).random(2) for _ in range(2)]
    np.testing.assert_array_equal(*draws)


def test_neighbouring_streams_are_independent():
    x = np.array([counted_generator("mask", seed=0, step=0, index=i).random(8) for i in range(2000)])
    assert np.abs(np.corrcoef(x.T) - np.eye(8)).max() < 0.1
    assert abs(np.corrcoef(x[:-1, 0], x[1:, 0])[0, 1]) < 0.1
