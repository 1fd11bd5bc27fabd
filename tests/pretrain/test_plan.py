from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from densedino.models.catalog import model_spec
from densedino.pretrain.plan import describe, make_plan
from densedino.recipes import RECIPES, recipe

CPU = torch.device("cpu")


def plan(run, *, measure=False):
    return make_plan(run, pictures=[("photos", 1000), ("more", 600)], device=CPU, output=Path("run"), measure=measure)


def test_stages_are_told_in_effective_numbers():
    made = plan(recipe("vitt16_small"))
    first = made.stages[0]
    assert first.images == 15_625 * 128
    assert first.epochs == first.images / 1600
    assert first.lr == pytest.approx(5e-4 * 4 * (128 / 1024) ** 0.5, rel=1e-2)
    assert first.seconds is None
    text = "\n".join(describe(made))
    for part in (
        "vitt16, 5.5 M parameters",
        "1,000 in photos; 600 in more",
        "pretrain: 15,625 steps of 128 images = 2,000,000 images, 1,250.0 epochs",
        "starts from random weights; crops 2×128 + 8×64 px",
        "EMA 0.992 → 1",
        "(Gram 256)",
        "2×224 + 8×64 px (Gram 336) at 0.4",
        "run/: metrics.jsonl",
    ):
        assert part in text, part
    assert "about" not in text.partition("takes")[0]


def test_time_is_told_where_it_was_measured():
    made = plan(recipe("debug"), measure=True)
    assert all(stage.seconds and stage.seconds > 0 for stage in made.stages)
    assert made.stages[2].seconds > made.stages[1].seconds  # larger crops
    assert "takes      about " in "\n".join(describe(made))


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_can_be_told(name):
    lines = describe(plan(recipe(name)))
    assert all("\n" not in line for line in lines)
    assert len([line for line in lines if line.startswith("stage ")]) == len(recipe(name).stages)


def test_micro_batches_and_models_of_ones_own_are_told():
    run = replace(recipe("debug"), micro_batch_size=8, model=replace(model_spec("debug_vit"), name="mine", depth=3))
    text = "\n".join(describe(plan(run)))
    assert "steps of 16 images, 8 at a time" in text
    assert "mine is not in the table of architectures" in text
