"""Against arrays built the way numpy users write these schedules."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from densedino.pretrain.schedules import CosineSchedule, StagedSchedule, scale_lr

values = st.floats(-5, 5)


@given(
    values, values, values, st.integers(0, 5), st.integers(0, 9), st.integers(1, 30), st.sampled_from([0.0, 0.5, 1.0])
)
def test_cosine_schedule(start, base, final, freeze, warmup, cosine, extra):
    total = freeze + warmup + cosine
    length = round(total * (1 + extra)) - freeze - warmup
    plain = np.concatenate(
        [
            np.zeros(freeze),
            np.linspace(start, base, warmup),
            final + 0.5 * (base - final) * (1 + np.cos(np.pi * np.arange(length) / length)),
        ]
    )[:total]
    schedule = CosineSchedule(
        base=base, final=final, total_steps=total, warmup_steps=warmup, warmup_start=start, freeze_steps=freeze,
        trunc_extra=extra,
    )  # fmt: skip
    np.testing.assert_allclose([schedule(i) for i in range(total)], plain, rtol=1e-9, atol=1e-9)
    if not extra:
        assert schedule(total) == schedule(total + 100) == pytest.approx(final)


@given(values, values, values, st.integers(0, 9), st.integers(0, 30), st.integers(0, 9))
def test_staged_schedule(start, peak, end, warmup, cosine, rest):
    plain = np.concatenate(
        [
            np.linspace(start, peak, warmup, endpoint=False),
            end + (peak - end) * (1 + np.cos(np.linspace(0, np.pi, cosine))) / 2,
            np.full(rest, end),
        ]
    )
    schedule = StagedSchedule(start=start, peak=peak, end=end, warmup_steps=warmup, cosine_steps=cosine)
    np.testing.assert_allclose([schedule(i) for i in range(len(plain))], plain, rtol=1e-9, atol=1e-9)


def test_the_gram_weight_of_the_released_recipe():
    weight = StagedSchedule(start=0, peak=0, end=2, warmup_steps=1_000_000, cosine_steps=1000)
    assert weight(999_999) == 0
    assert 0.9 < weight(1_000_500) < 1.1
    assert weight(1_001_000) == weight(1_199_999) == 2


@pytest.mark.parametrize(
    ("lr", "batch_size", "rule", "effective"),
    [
        (5e-5, 4096, "sqrt_wrt_1024", 4.0e-4),
        (1.25e-5, 2048, "sqrt_wrt_1024", 7.07e-5),
        (1e-3, 2048, "sqrt_wrt_1024", 5.66e-3),
        (1e-3, 64, "sqrt_wrt_1024", 1e-3),
        (1e-3, 512, "linear_wrt_256", 2e-3),
        (1e-3, 512, "none", 1e-3),
    ],
)
def test_scaling_rules_give_the_published_rates(lr, batch_size, rule, effective):
    assert scale_lr(lr, batch_size=batch_size, rule=rule) == pytest.approx(effective, rel=2e-3)
