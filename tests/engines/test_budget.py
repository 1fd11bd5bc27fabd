from __future__ import annotations

import mmap

import pytest
import torch

from densedino.engines.budget import block_bytes, format_bytes, parse_bytes, plan_stream, resident_bytes
from densedino.errors import InputError
from densedino.models.catalog import MODELS

BIG = MODELS["vit7b16"]


def planned(budget, *, images=8, tokens=1029, outputs=1, dtype=torch.bfloat16, resident=500_000_000):
    return plan_stream(
        BIG, images=images, tokens=tokens, outputs=outputs, dtype=dtype, budget=budget, resident=resident
    )


@pytest.mark.parametrize(
    ("text", "number"),
    [("3GB", 3 * 10**9), ("2.5 GiB", 5 * 2**29), ("800mb", 8 * 10**8), ("1g", 10**9), (123, 123), ("64KiB", 65536)],
)
def test_sizes_are_read(text, number):
    assert parse_bytes(text) == number


@pytest.mark.parametrize("text", ["", "GB", "3 apples", "-1GB", "0", "1e9"])
def test_what_is_no_size_is_said(text):
    with pytest.raises(InputError, match="'3GB'"):
        parse_bytes(text)


def test_sizes_are_written():
    assert [format_bytes(n) for n in (3e9, 12_345_678_901, 456_000_000)] == ["3.00 GB", "12.35 GB", "456 MB"]


def test_resident_memory_grows_with_what_is_held():
    before = resident_bytes()
    with mmap.mmap(-1, 200_000_000) as held:  # not the allocator's, which may have as much left from earlier tests
        held.write(b"x" * len(held))
        assert resident_bytes() == 0 or resident_bytes() - before > 0.9 * len(held)


def test_three_gigabytes_are_enough_for_the_largest_model_without_chunks():
    plan = planned(3 * 10**9)
    assert (plan.attention_images, plan.mlp_tokens, plan.buffers) == (8, 8 * 1029, 2) and plan.peak_bytes <= 3 * 10**9
    assert block_bytes(BIG, torch.bfloat16) == pytest.approx(336e6, rel=0.01)


def test_less_memory_gives_way_step_by_step():
    """First temporaries shrink, then reading ahead goes; then it is an error with the least that works."""
    seen = []
    for budget in range(3 * 10**9, 5 * 10**8, -5 * 10**7):
        try:
            plan = planned(budget)
        except InputError as error:
            least = float(str(error).split("at least ")[1].split(" GB")[0]) * 1e9
            assert least > budget and planned(int(least + 1e6)).buffers == 1
            break
        assert plan.peak_bytes <= budget
        seen.append((plan.buffers, plan.attention_images))
    assert seen == sorted(seen, key=lambda one: one[0], reverse=True) and seen[0] == (2, 8)
    assert {(2, 1), (1, 1)} <= set(seen)


def test_more_outputs_and_float32_take_more():
    assert planned(10**10, outputs=4).peak_bytes > planned(10**10).peak_bytes
    assert planned(10**10, dtype=torch.float32).peak_bytes > planned(10**10).peak_bytes
