"""The table of recipes: lazy, complete, strict."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from dataclasses import replace

import pytest

from densedino.config import from_dict, to_dict
from densedino.errors import InputError, UnknownNameError
from densedino.pretrain.contradictions import find_contradictions
from densedino.pretrain.settings import RunConfig
from densedino.recipes import RECIPES, list_recipes, recipe


@pytest.mark.parametrize("name", list_recipes())
def test_every_recipe_is_a_sound_config_that_survives_json(name: str) -> None:
    config = recipe(name)
    assert from_dict(type(config), json.loads(json.dumps(to_dict(config)))) == config
    if isinstance(config, RunConfig):
        assert not find_contradictions(config)
        paper = config.with_fidelity("paper")
        assert not find_contradictions(paper)
        assert paper != config
        assert paper.with_fidelity("released") == config


def test_every_public_recipe_function_without_arguments_is_in_the_table() -> None:
    for module in {module for module, _ in RECIPES.values()}:
        names = importlib.import_module(f"densedino.recipes.{module}").__all__
        assert {name for name, (home, _) in RECIPES.items() if home == module} <= set(names)


def test_a_misspelt_name_is_an_error_with_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'vitt16_small'"):
        recipe("vitt16_smal")


def test_a_switch_set_in_one_place_only_is_found() -> None:
    config = replace(recipe("debug"), fidelity="paper")
    problems = "\n".join(find_contradictions(config))
    assert problems.count("with_fidelity") == 7, "four resolutions' blur and three stages' RoPE"


def test_a_misspelt_key_is_an_error_with_the_nearest() -> None:
    data = to_dict(recipe("debug"))
    data["stages"][0]["losses"]["koleo_wieght"] = 0.2
    with pytest.raises(InputError, match=r"koleo_wieght: unknown key; did you mean 'koleo_weight'"):
        from_dict(RunConfig, data)


def test_listing_recipes_loads_no_torch() -> None:
    code = "import sys; from densedino.recipes import list_recipes; list_recipes(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
