"""The fit loop: it fits, keeps the best, stops early, and ends with the same bits after any interruption."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn

from densedino.adapters.fit import FitConfig, Fitted, fit
from densedino.errors import InputError, StateDictError, TrainingError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

CONFIG = FitConfig(steps=40, every=10, lr=0.05, patience=0)
X = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
Y = X @ torch.arange(5.0)


class StopRunError(Exception):
    pass


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 1))


def run(
    module: nn.Module,
    state: Path,
    *,
    config: FitConfig = CONFIG,
    stop: int = -1,
    scores: Callable[[], float] | None = None,
    name: str = "a",
) -> Fitted:
    def loss_at(step: int) -> Tensor:
        if step == stop:
            raise StopRunError
        rows = torch.randperm(64, generator=torch.Generator().manual_seed(step))[:8]
        return (module.train()(X[rows])[:, 0] - Y[rows]).square().mean()

    def validate() -> float:
        with torch.no_grad():
            return float((module.eval()(X)[:, 0] - Y).square().mean())

    carried = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return fit(
        carried,
        [{"params": list(module.parameters())}],
        loss_at=loss_at,
        validate=scores or validate,
        higher_is_better=False,
        config=config,
        state=state,
        identity={"name": name},
    )


def test_it_fits(tmp_path: Path) -> None:
    fitted = run(model(), tmp_path / "s.safetensors", config=FitConfig(steps=300, every=100, lr=0.1, patience=0))
    assert fitted.history[-1]["score"] < 0.3 * fitted.history[0]["score"]
    assert [entry["step"] for entry in fitted.history] == [100, 200, 300]


@pytest.mark.parametrize("stop", [3, 10, 25, 39])
def test_interrupted_is_the_same(stop: int, tmp_path: Path) -> None:
    whole, parts = model(), model()
    first = run(whole, tmp_path / "whole.safetensors")
    with pytest.raises(StopRunError):
        run(parts, tmp_path / "parts.safetensors", stop=stop)
    parts = model()
    assert run(parts, tmp_path / "parts.safetensors") == first
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), parts.state_dict().values(), strict=True))
    assert run(model(), tmp_path / "parts.safetensors", stop=0) == first  # done: nothing is taken again


def test_the_best_is_kept_and_patience_ends(tmp_path: Path) -> None:
    seen: list[dict[str, Tensor]] = []
    module = model()
    scores = iter([5.0, 2.0, 3.0, 4.0, 1.0])

    def next_score() -> float:
        seen.append({k: v.clone() for k, v in module.state_dict().items()})
        return next(scores)

    config = FitConfig(steps=50, every=10, lr=0.05, patience=2)
    fitted = run(module, tmp_path / "s.safetensors", config=config, scores=next_score)
    assert (fitted.steps, fitted.best_step, fitted.score) == (40, 20, 2.0)
    assert all(torch.equal(value, seen[1][key]) for key, value in module.state_dict().items())


def test_faults(tmp_path: Path) -> None:
    state = tmp_path / "s.safetensors"
    run(model(), state)
    with pytest.raises(InputError, match=r'identity\.name: "a" before, "b" now'):
        run(model(), state, name="b")
    with pytest.raises(InputError, match=r"fit\.lr: 0\.05 before, 0\.1 now"):
        run(model(), state, config=FitConfig(steps=40, every=10, lr=0.1, patience=0))
    state.write_bytes(b"{}")
    with pytest.raises(StateDictError, match="no checkpoint of a fit"):
        run(model(), state)
    broken = model()
    with torch.no_grad():
        broken[1].weight.fill_(math.nan)
    with pytest.raises(TrainingError, match="loss of step 1 is nan"):
        run(broken, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="steps"):
        FitConfig(steps=0)


def test_the_learning_rate_rises_and_falls() -> None:
    config = FitConfig(steps=100, warmup=0.1)
    factors = [config.factor(step) for step in range(100)]
    assert factors[0] == pytest.approx(0.1) and max(factors) == 1.0 and factors[-1] < 1e-3
    assert factors[:10] == sorted(factors[:10]) and factors[10:] == sorted(factors[10:], reverse=True)
