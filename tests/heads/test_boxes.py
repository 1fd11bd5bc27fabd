from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from densedino.heads.boxes import centres_of, corners_of, moved


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31))
def test_corners_and_centres_are_inverse(seed: int) -> None:
    boxes = torch.rand(3, 5, 4, generator=torch.Generator().manual_seed(seed)) * 100
    assert torch.allclose(centres_of(corners_of(boxes)), boxes, atol=1e-4)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.1, 50))
def test_a_moved_box_stays_in_the_image(seed: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    boxes = torch.rand(2, 6, 4, generator=generator) * 100
    sizes = torch.tensor([[80.0, 60.0], [50.0, 90.0]])
    corners = corners_of(moved(boxes, torch.randn(2, 6, 4, generator=generator) * spread, sizes))
    assert (corners >= -1e-3).all() and (corners <= sizes.repeat(1, 2)[:, None] + 1e-3).all()


def test_a_shift_is_in_sides_and_a_stretch_in_logarithms() -> None:
    out = moved(
        torch.tensor([[[50.0, 40, 20, 10]]]), torch.tensor([[[0.5, -1, 0.6931472, 0]]]), torch.full((1, 2), 1e3)
    )
    assert torch.allclose(out, torch.tensor([[[60.0, 30, 40, 10]]]))
