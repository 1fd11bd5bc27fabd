from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from densedino.tasks import sliding
from densedino.tasks.sliding import classes_at, resized, slide, window_bounds


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.integers(8, 120), st.data())
def test_windows_cover_the_side(side: int, crop: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, crop))
    bounds = window_bounds(side, crop=crop, stride=stride)
    assert bounds[0][0] == 0 and bounds[-1][1] == side
    assert all(b - a == min(crop, side) for a, b in bounds)
    assert all(after[0] <= before[1] for before, after in itertools.pairwise(bounds))


def test_published_windows() -> None:
    assert window_bounds(1195, crop=896, stride=596) == [(0, 896), (299, 1195)]
    assert window_bounds(896, crop=896, stride=596) == [(0, 896)]


@pytest.mark.parametrize("size", [(40, 60), (90, 33), (128, 128)])
def test_what_windows_agree_on_is_left(size: tuple[int, int]) -> None:
    image = torch.randn(1, 3, *size)
    assert torch.allclose(
        slide(image, lambda window: window[:, :2] * 2, crop=64, stride=43), image[:, :2] * 2, atol=1e-6
    )


@pytest.mark.parametrize("strip", [1, 1 << 27])
def test_classes_are_those_of_the_resized_values(strip: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sliding, "_STRIP_BYTES", strip)
    values = torch.randn(1, 7, 13, 9)
    for size in ((50, 31), (13, 9), (7, 20)):
        whole = F.interpolate(values, size=size, mode="bilinear")[0].max(0)
        classes, best = classes_at(values, size)
        assert torch.allclose(best, whole.values, atol=1e-5)
        assert (classes == whole.indices).float().mean() > 0.999 and classes.dtype == torch.uint8
    assert resized(values, (13, 9)) is values
