from __future__ import annotations

import math

import pytest

from densedino.errors import TrainingError
from densedino.pretrain.guard import LIMIT, WINDOW, Guard
from densedino.pretrain.step import StepReport, StepValues

VALUES = StepValues(lr=1e-3, last_layer_lr=1e-3, weight_decay=0.0, momentum=0.9, teacher_temperature=0.07)


def report(*, finite, loss=math.nan, norm=math.nan, suspects=("a.jpg", "b.jpg")):
    return StepReport(
        losses={"dino_global": 1.0, "ibot": loss, "total": loss},
        gradient_norms={"backbone": norm, "ibot_head": 1.0},
        finite=finite,
        values=VALUES,
        sample_ids=suspects,
        suspects=() if finite else suspects,
        features={},
    )


def test_one_step_is_said_with_its_samples_and_the_run_goes_on():
    lines = []
    guard = Guard(say=lines.append)
    guard.check(1, report(finite=True))
    guard.check(2000, report(finite=False))
    assert lines == ["step 2,000 changed nothing: loss ibot, gradient of backbone not finite; samples: a.jpg, b.jpg"]
    assert (guard.count, list(guard.recent)) == (1, [2000])


def test_too_many_of_the_last_steps_end_it_with_a_diagnosis():
    guard = Guard(say=lambda _: None)
    for step in range(10, 10 + LIMIT - 1):
        guard.check(step, report(finite=False))
    with pytest.raises(TrainingError) as error:
        guard.check(WINDOW + 9, report(finite=False, suspects=tuple(f"{n}.jpg" for n in range(6))))
    text = str(error.value)
    assert "5 of the last 50 steps were not finite (10, 11, 12, 13, 59)" in text
    assert "learning rate 0.001" in text
    assert "0.jpg, 1.jpg, 2.jpg, 3.jpg and 2 more" in text
    assert "lower optimizer.lr" in text


def test_the_window_moves_on():
    guard = Guard(say=lambda _: None)
    for step in range(10, 10 + LIMIT - 1):
        guard.check(step, report(finite=False))
    guard.check(WINDOW + 10, report(finite=False))
    assert guard.count == LIMIT


def test_steps_of_an_earlier_sitting_count():
    guard = Guard(say=lambda _: None, recent=[1, 2, 3, 4])
    with pytest.raises(TrainingError, match="gradients are not: lower"):
        guard.check(5, report(finite=False, loss=1.0))
