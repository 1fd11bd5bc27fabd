"""Owns how learning rate, weight decay, momentum, temperatures and loss weights go with the step: pure functions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

__all__ = ["CosineSchedule", "LrScaling", "Schedule", "StagedSchedule", "constant", "scale_lr"]

LrScaling = Literal["sqrt_wrt_1024", "linear_wrt_256", "none"]


@dataclass(frozen=True, kw_only=True)
class CosineSchedule:
    """Zero, linear warm-up, half a cosine from `base` to `final` at `total_steps` (the first recipes, as in DINOv2).

    Attributes:
        base: value after the warm-up; reached with the warm-up's last step.
        final: value from `total_steps` on.
        total_steps: steps of the stage, freezing and warm-up included.
        warmup_steps: steps from `warmup_start` to `base`, both included.
        warmup_start: value of the warm-up's first step.
        freeze_steps: steps at zero before the warm-up.
        trunc_extra: the schedule is laid out for (1 + trunc_extra) times the steps and cut: it ends above `final`.
    """

    base: float
    final: float
    total_steps: int
    warmup_steps: int = 0
    warmup_start: float = 0.0
    freeze_steps: int = 0
    trunc_extra: float = 0.0

    def __call__(self, step: int) -> float:
        """The value at `step`, counted from 0."""
        if step < self.freeze_steps:
            return 0.0
        step -= self.freeze_steps
        if step < self.warmup_steps:
            return self.warmup_start + (self.base - self.warmup_start) * step / max(self.warmup_steps - 1, 1)
        length = round(self.total_steps * (1 + self.trunc_extra)) - self.freeze_steps - self.warmup_steps
        progress = (step - self.warmup_steps) / length if length > 0 else 1.0
        return _half_cosine(self.base, self.final, progress)


@dataclass(frozen=True, kw_only=True)
class StagedSchedule:
    """Linear from `start` to `peak`, half a cosine from `peak` to `end`, then constant (the later recipes).

    With start = peak the cosine alone does the warm-up; with all three equal the value is constant.

    Attributes:
        start: value of the first step.
        peak: value of step `warmup_steps`.
        end: value of the cosine's last step and of all that follow.
        warmup_steps: steps of the linear part.
        cosine_steps: steps of the cosine, from `peak` to `end`, both included.
    """

    start: float
    peak: float
    end: float
    warmup_steps: int = 0
    cosine_steps: int = 0

    def __call__(self, step: int) -> float:
        """The value at `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.start + (self.peak - self.start) * step / self.warmup_steps
        into = step - self.warmup_steps
        if into >= self.cosine_steps:
            return self.end
        return _half_cosine(self.peak, self.end, into / max(self.cosine_steps - 1, 1))


Schedule = CosineSchedule | StagedSchedule


def constant(value: float) -> StagedSchedule:
    """The schedule that stays at `value`."""
    return StagedSchedule(start=value, peak=value, end=value)


def scale_lr(lr: float, *, batch_size: int, rule: LrScaling) -> float:
    """The learning rate in effect for a global batch of `batch_size` images.

    `sqrt_wrt_1024` gives 4·√(batch/1024) times `lr`: four times at 1024 images and once at 64, not once at 1024.
    """
    factors = {"sqrt_wrt_1024": 4 * math.sqrt(batch_size / 1024), "linear_wrt_256": batch_size / 256, "none": 1.0}
    return lr * factors[rule]


def _half_cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0))) / 2
