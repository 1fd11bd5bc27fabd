from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from safetensors.torch import save_file

from densedino.models.catalog import create_model
from densedino.pretrain.contradictions import find_contradictions
from densedino.pretrain.step import step_values
from densedino.recipes import RECIPES, recipe
from densedino.recipes.one_machine import going_on

if TYPE_CHECKING:
    from pathlib import Path

OURS = [name for name, (module, _) in RECIPES.items() if module == "one_machine"]


@pytest.mark.parametrize("name", OURS)
def test_a_recipe_is_sound_whatever_it_runs_on(name: str) -> None:
    config = recipe(name)
    assert config.model == ("debug_vit" if name == "debug" else name.partition("_")[0])
    for world_size in (1, 2, 4):
        assert not find_contradictions(config, world_size=world_size)
    for stage in config.stages:
        lrs = [step_values(stage, step).lr for step in range(0, stage.steps, max(1, stage.steps // 50))]
        assert 0 < max(lrs) < 2e-3
        assert stage.steps < 200_000


@pytest.mark.parametrize("name", [name for name in OURS if "continue" not in name])
def test_three_stages_follow_each_other(name: str) -> None:
    pretrain, gram, highres = recipe(name).stages
    assert (pretrain.start, gram.start, highres.start) == ("random", "previous", "previous")
    assert pretrain.losses.gram is None
    assert gram.losses.gram is not None
    assert highres.losses.gram is not None
    assert gram.steps < pretrain.steps
    assert highres.steps <= gram.steps
    sizes = [max(r.crops.global_size for r in stage.resolutions) for stage in (pretrain, gram, highres)]
    assert sizes[0] == sizes[1] < sizes[2]
    assert step_values(gram, gram.steps - 1).gram_weight == pytest.approx(2.0)


def test_going_on_spares_the_backbone_until_the_heads_know_it(tmp_path: Path) -> None:
    path = tmp_path / "mine.safetensors"
    save_file(create_model("debug_vit").state_dict(), path)
    config = going_on("debug_vit", str(path), batch_size=16, steps=50)
    heads, adapt = config.stages
    assert not find_contradictions(config)
    assert heads.frozen_backbone_steps == heads.steps == 10
    assert all(step_values(heads, step).frozen_backbone for step in range(10))
    assert not step_values(adapt, 0).frozen_backbone
    assert adapt.start == "previous"
    assert adapt.losses.gram is not None
    assert max(step_values(adapt, step).lr for step in range(50)) < max(step_values(heads, s).lr for s in range(10))
