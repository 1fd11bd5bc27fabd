"""Linear classification: a whole run, and what is held out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from densedino.evals.linear import Settings, _fit, held_out
from densedino.evals.plan import Plan
from densedino.evals.run import evaluate

if TYPE_CHECKING:
    from pathlib import Path


def test_a_run_learns_classes_by_colour(class_folder: Path, tmp_path: Path, silent: Any) -> None:
    plan = Plan(
        protocol="linear",
        data=class_folder,
        models=("raw",),
        output=tmp_path / "run",
        seeds=3,
        settings=Settings(steps=150, batch=16),
    )
    row = evaluate(plan, narrator=silent, workers=0)["rows"][0]
    assert row["seeds"] == 3 and row["metrics"]["top1"]["mean"] > 90


def test_held_out_is_of_every_class_and_leaves_something() -> None:
    labels = torch.tensor([0] * 20 + [1] * 2 + [2])
    learn, choose = held_out(labels, 0.1, seed=0)
    assert sorted([*learn.tolist(), *choose.tolist()]) == list(range(23))
    assert labels[choose].tolist().count(0) == 2 and 1 in labels[choose] and 2 not in labels[choose]


def test_all_rates_are_trained_as_each_by_itself() -> None:
    """The same steps by torch's SGD and autograd."""
    torch.manual_seed(0)
    x, y, settings = torch.randn(40, 5), torch.randint(0, 3, (40,)), Settings(steps=20, batch=8)
    rates = torch.tensor([0.01, 0.1])
    weights, biases = _fit(x, y, rates=rates, classes=3, settings=settings, seed=4)
    for i, rate in enumerate(rates.tolist()):
        generator = torch.Generator().manual_seed(4)
        head = torch.nn.Linear(5, 3)
        with torch.no_grad():
            head.weight.copy_((torch.randn(2, 5, 3, generator=generator) * 0.01)[i].T)
            head.bias.zero_()
        optimizer = torch.optim.SGD(head.parameters(), lr=rate, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
        for _ in range(20):
            pick = torch.randint(40, (8,), generator=generator)
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(head(x[pick]), y[pick]).backward()
            optimizer.step()
            schedule.step()
        torch.testing.assert_close(weights[i], head.weight.detach().T, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(biases[i, 0], head.bias.detach(), atol=1e-5, rtol=1e-4)
