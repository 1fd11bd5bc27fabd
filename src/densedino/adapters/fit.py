"""Owns the one loop that fits small parts to labels: AdamW, early stopping, the best kept, resume after a kill."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from densedino.checkpoint import atomic_path
from densedino.errors import InputError, StateDictError, TrainingError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    from torch import Tensor

__all__ = ["FitConfig", "Fitted", "Progress", "first_difference", "fit"]


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """How a part is fitted. The learning rate rises over `warmup` and falls to 0 as half a cosine."""

    steps: int = 400
    batch_size: int = 8
    lr: float = 1e-3
    weight_decay: float = 1e-2
    warmup: float = 0.05
    """Share of the steps."""
    every: int = 50
    """Steps from one validation, and one checkpoint, to the next."""
    patience: int = 8
    """Validations without a better score until it stops; 0: never."""
    clip: float = 1.0
    """Largest norm of all gradients together."""

    def __post_init__(self) -> None:
        least = min(self.steps, self.batch_size, self.every)
        if least < 1 or self.lr <= 0 or self.weight_decay < 0 or not 0 <= self.warmup < 1 or self.patience < 0:
            raise InputError(
                f"{self}: steps, batch_size, every at least 1, lr above 0, warmup in [0, 1), others not below 0."
            )

    def factor(self, step: int) -> float:
        """Of the learning rate at a step, counted from 0."""
        warm = max(1, round(self.warmup * self.steps))
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, self.steps - warm)))


@dataclass(frozen=True)
class Progress:
    """After a step."""

    step: int
    steps: int
    loss: float
    score: float | None
    """Of the validation after this step, if there was one."""


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """What a fit came to."""

    steps: int
    """That were taken."""
    best_step: int
    score: float
    """Of the best step, whose values the carried tensors have now."""
    history: tuple[dict[str, float], ...]
    """step, loss (mean since the one before), score of every validation."""


def fit(
    carried: Mapping[str, Tensor],
    groups: Iterable[dict[str, Any]],
    *,
    loss_at: Callable[[int], Tensor],
    validate: Callable[[], float],
    higher_is_better: bool,
    config: FitConfig,
    state: Path,
    identity: Mapping[str, Any],
    advance: Callable[[Progress], None] = lambda progress: None,
) -> Fitted:
    """Fit parameters, and leave the values of the best validation in them.

    A run that was killed goes on from its last validation when it is called again, and ends with the same numbers.

    Args:
        carried: every tensor that changes, by name: the parameters of `groups`, and buffers.
        groups: for AdamW; "lr_multiplier" and "wd_multiplier" of a group, 1 by default, multiply the configuration's.
        loss_at: the loss of a step; depends on the step's number and the tensors alone.
        validate: the score.
        higher_is_better: of scores.
        config: how.
        state: the checkpoint's file, replaced at every validation.
        identity: what the run is; a checkpoint of another one is refused. JSON.
        advance: called after every step.

    Raises:
        InputError: `state` is of a run with another identity.
        TrainingError: the loss is not finite.
    """
    run = _Run(carried, groups, config, state, {"identity": dict(identity), "fit": asdict(config)})
    better = 1 if higher_is_better else -1
    run.resume()
    while run.step < config.steps and not run.stopped:
        run.total += run.take(loss_at)
        due = run.step % config.every == 0 or run.step == config.steps
        score = validate() if due else None
        if score is not None:
            run.note(score, better)
        advance(Progress(run.step, config.steps, run.last, score))
    run.restore_best()
    best = run.history[run.best]
    return Fitted(steps=run.step, best_step=int(best["step"]), score=best["score"], history=tuple(run.history))


class _Run:
    """The state of a fit, and its checkpoint."""

    def __init__(
        self,
        carried: Mapping[str, Tensor],
        groups: Iterable[dict[str, Any]],
        config: FitConfig,
        state: Path,
        identity: dict[str, Any],
    ) -> None:
        self.carried = {name: tensor.detach() for name, tensor in carried.items()}
        self.config, self.path, self.identity = config, state, identity
        names = {id(tensor): name for name, tensor in carried.items()}
        self.optimizer = torch.optim.AdamW(list(groups), lr=config.lr, weight_decay=config.weight_decay)
        self.trained = {names[id(p)]: p for group in self.optimizer.param_groups for p in group["params"]}
        self.step, self.best, self.last, self.total = 0, 0, math.nan, 0.0
        self.history: list[dict[str, float]] = []
        self.best_tensors: dict[str, Tensor] = {}

    @property
    def stopped(self) -> bool:
        return bool(self.config.patience) and len(self.history) - 1 - self.best >= self.config.patience

    def take(self, loss_at: Callable[[int], Tensor]) -> float:
        factor = self.config.factor(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * factor * group.get("lr_multiplier", 1.0)
            group["weight_decay"] = self.config.weight_decay * group.get("wd_multiplier", 1.0)
        self.optimizer.zero_grad()
        with torch.enable_grad():
            loss = loss_at(self.step)
            self.last = float(loss.detach())
            if not math.isfinite(self.last):
                raise TrainingError(
                    f"the loss of step {self.step + 1} is {self.last}. Lower the learning rate, or look at the "
                    "features: are they finite?"
                )
            loss.backward()
        torch.nn.utils.clip_grad_norm_(list(self.trained.values()), self.config.clip)
        self.optimizer.step()
        self.step += 1
        return self.last

    def note(self, score: float, better: int) -> None:
        since = self.step - int(self.history[-1]["step"] if self.history else 0)
        self.history.append({"step": self.step, "loss": self.total / since, "score": score})
        self.total = 0.0
        before = self.history[self.best]["score"] if len(self.history) > 1 else math.nan
        if not better * score <= better * before:  # also true where the one before is NaN
            self.best = len(self.history) - 1
            self.best_tensors = {name: tensor.clone() for name, tensor in self.carried.items()}
        self._save()

    def restore_best(self) -> None:
        with torch.no_grad():
            for name, tensor in self.best_tensors.items():
                self.carried[name].copy_(tensor)

    def _moments(self) -> dict[str, Tensor]:
        found = {}
        for name, parameter in self.trained.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                found[f"optimizer.{name}.{key}"] = value
        return found

    def _save(self) -> None:
        tensors = {f"now.{name}": tensor for name, tensor in self.carried.items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self.best_tensors.items()}
        tensors |= self._moments()
        text = json.dumps({"step": self.step, "best": self.best, "history": self.history, "run": self.identity})
        with atomic_path(self.path) as scratch:
            save_file({k: v.detach().contiguous() for k, v in tensors.items()}, scratch, metadata={"fit": text})

    @torch.no_grad()
    def resume(self) -> None:
        if not self.path.exists():
            return
        try:
            with safe_open(self.path, framework="pt") as file:
                notes = json.loads((file.metadata() or {})["fit"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, KeyError, ValueError) as error:
            raise StateDictError(
                f"{self.path} is no checkpoint of a fit ({error}). Remove it to begin anew."
            ) from error
        if notes["run"] != json.loads(json.dumps(self.identity)):
            raise InputError(
                f"{self.path} is of a run with other settings: {first_difference(notes['run'], self.identity)}. Give "
                "another output folder, or the settings that it had."
            )
        for name, tensor in self.carried.items():
            tensor.copy_(tensors[f"now.{name}"])
            self.best_tensors[name] = tensors[f"best.{name}"].to(tensor.device)
        for name, parameter in self.trained.items():
            keys = [k for k in tensors if k.startswith(f"optimizer.{name}.") and k.count(".") == name.count(".") + 2]
            if keys:
                moments = {key.rpartition(".")[2]: tensors[key] for key in keys}
                moved = {k: v if k == "step" else v.to(parameter.device) for k, v in moments.items()}
                self.optimizer.state[parameter] = moved
        self.step, self.best, self.history = notes["step"], notes["best"], notes["history"]


def first_difference(before: Any, now: Any, place: str = "") -> str:
    """Where two values of JSON differ that are not equal: "fit.lr: 0.1 before, 0.2 now"."""
    now = json.loads(json.dumps(now))
    if isinstance(before, dict) and isinstance(now, dict):
        for key in (*before, *now):
            if before.get(key) != now.get(key):
                return first_difference(before.get(key), now.get(key), f"{place}.{key}" if place else key)
    return f"{place}: {json.dumps(before)[:60]} before, {json.dumps(now)[:60]} now"
