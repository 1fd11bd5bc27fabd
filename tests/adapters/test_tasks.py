"""Losses, scores and answers of the three tasks."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from densedino.adapters.tasks import NOT_COUNTED, Meter, Prediction, Task, answer, at_pixels, task_loss
from densedino.errors import InputError, UnknownNameError
from densedino.images.transforms import Transform

SEGMENTS = Task(kind="segmentation", classes=("a", "b", "c"))
DEPTH = Task(kind="depth", most_depth=5.0)


def test_pixels_of_no_class_do_not_count() -> None:
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)
    targets = torch.randint(0, 3, (1, 4, 4))
    whole = task_loss(SEGMENTS, logits, targets)
    torch.testing.assert_close(whole, torch.nn.functional.cross_entropy(logits, targets))
    targets[0, 0] = NOT_COUNTED
    part = task_loss(SEGMENTS, logits, targets)
    torch.testing.assert_close(part, torch.nn.functional.cross_entropy(logits[:, :, 1:], targets[:, 1:]))
    nothing = task_loss(SEGMENTS, logits, torch.full((1, 4, 4), NOT_COUNTED))
    assert nothing.item() == 0.0


@settings(max_examples=20, deadline=None)
@given(scale=st.floats(0.3, 3.0))
def test_silog_forgives_most_of_a_common_factor(scale: float) -> None:
    # logits that put all weight on one bin tell its depth, but for the 0.1 that every bin gets
    logits = torch.rand(1, 256, 3, 3, generator=torch.Generator().manual_seed(0)) * 50
    from densedino.heads.bins import depth_of

    told = depth_of(logits, DEPTH.bins)[:, 0]
    loss = task_loss(DEPTH, logits, told / scale).item()
    inside = bool((told / scale <= DEPTH.most_depth).all())
    if inside:
        assert loss == pytest.approx(math.sqrt(max(0.15 * math.log(scale) ** 2, 1e-8)), rel=1e-2, abs=1e-3)


def test_unknown_depths_do_not_count() -> None:
    logits = torch.rand(1, 256, 2, 2)
    known = torch.full((1, 2, 2), 2.0)
    holes = known.clone()
    holes[0, 0] = torch.tensor([math.nan, 0.0])
    holes[0, 1, 0] = 9.0  # beyond the largest
    logits.requires_grad_()
    loss = task_loss(DEPTH, logits, holes)
    loss.backward()
    assert math.isfinite(loss.item()) and bool(torch.isfinite(logits.grad).all())
    assert float(logits.grad[0, :, 0].abs().sum()) == 0 and float(logits.grad[0, :, 1, 1].abs().sum()) > 0


def test_answers_are_at_the_images_own_pixels() -> None:
    """A ramp over the columns stays a ramp, whatever was resized and padded."""
    transform = Transform(mean=(0.5,) * 3, std=(0.5,) * 3, resize=(40, 56))
    geometry = transform.geometry(100, 140)
    assert geometry.grid == (3, 4)
    ramp = ((torch.arange(4) + 0.5) * 16)[None, None, None].expand(1, 1, 3, 4)
    told = at_pixels(ramp, geometry, (100, 140), stride=16)
    expected = (torch.arange(140) + 0.5) * 56 / 140
    inside = expected > 8  # outside the outermost centres the nearest holds
    torch.testing.assert_close(told[0, 50][inside], expected[inside])
    labels = answer(SEGMENTS, torch.randn(1, 3, 6, 8), geometry, (100, 140), stride=16)
    assert labels.labels is not None and labels.labels.shape == (100, 140)


def test_meters() -> None:
    meter = Meter(SEGMENTS)
    true = torch.tensor([[0, 0, 1, 255]])
    meter.add(Prediction(kind="segmentation", labels=torch.tensor([[0, 1, 1, 2]])), true)
    assert meter.score == pytest.approx(50.0)  # classes 0 and 1 at 1/2; class 2 only where nothing counts
    depth = Meter(DEPTH)
    depth.add(Prediction(kind="depth", depth=torch.tensor([[1.0, 3.0]])), torch.tensor([[1.5, math.nan]]))
    assert depth.score == pytest.approx(0.5)
    whole = Meter(Task(kind="classification", classes=("a", "b")))
    for label in (0, 1, 1, 1):
        whole.add(Prediction(kind="classification", label=label), 1)
    assert whole.score == 75.0
    assert math.isnan(Meter(DEPTH).score)


def test_tasks_that_are_none_are_refused() -> None:
    with pytest.raises(UnknownNameError, match="segmentation"):
        Task(kind="segment")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="metres"):
        Task(kind="depth", depth_unit=0)
