"""Owns what becomes of steps that are not finite: each is said with its samples, and too many of them end a run."""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING

import torch.distributed as dist

from densedino.distributed import world_size
from densedino.errors import TrainingError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from densedino.pretrain.step import StepReport

__all__ = ["LIMIT", "WINDOW", "Guard"]

LIMIT, WINDOW = 5, 50
"""So many steps that are not finite, of so many in a row, end a run."""
_SHOWN = 4


class Guard:
    """Watches the steps of a run. Every process has one and calls it alike.

    Args:
        say: takes what there is to tell.
        recent: the last steps that were not finite, of an earlier sitting.
    """

    def __init__(self, *, say: Callable[[str], None], recent: Iterable[int] = ()) -> None:
        self.say = say
        self.recent = deque(recent, maxlen=LIMIT)
        self.count = 0
        """Steps of this sitting that were not finite."""

    def check(self, step: int, report: StepReport) -> None:
        """Take note of a step (of the run, counted from 1).

        Raises:
            TrainingError: it is one too many.
        """
        if report.finite:
            return
        self.count += 1
        self.recent.append(step)
        suspects = _everyones(report.suspects)
        self.say(f"step {step:,} changed nothing: {_symptom(report)} not finite; samples: {_some(suspects)}")
        if len(self.recent) == LIMIT and step - self.recent[0] < WINDOW:
            steps = ", ".join(f"{number:,}" for number in self.recent)
            raise TrainingError(
                f"{LIMIT} of the last {WINDOW} steps were not finite ({steps}), and the weights stay where they are."
                f" In the last of them: {_symptom(report)}; learning rate {report.values.lr:.3g}; samples:"
                f" {_some(suspects)}. {_advice(report)} The last snapshot stands; with other settings, go on from it"
                " by accept_changes=True (--accept-changes)."
            )


def _everyones(names: tuple[str, ...]) -> list[str]:
    if world_size() == 1:
        return list(names)
    gathered: list[tuple[str, ...]] = [()] * world_size()
    dist.all_gather_object(gathered, names)
    return [name for part in gathered for name in part]


def _symptom(report: StepReport) -> str:
    losses = [f"loss {name}" for name, value in report.losses.items() if not math.isfinite(value) and name != "total"]
    norms = [f"gradient of {name}" for name, value in report.gradient_norms.items() if not math.isfinite(value)]
    return ", ".join([*losses, *norms]) or "a loss or gradient"


def _advice(report: StepReport) -> str:
    if any(not math.isfinite(value) for value in report.losses.values()):
        return (
            "If it is always the same samples, their pixels are NaN or far out of range: leave them out. Otherwise the"
            " run diverged: lower optimizer.lr or lengthen its warm-up."
        )
    return "Losses are finite and gradients are not: lower optimizer.lr, or use precision='fp32'."


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return (", ".join(names[:_SHOWN]) or "unknown") + more
