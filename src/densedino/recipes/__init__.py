"""Recipes: functions that return the settings of a run, and nothing else."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from densedino.errors import UnknownNameError

if TYPE_CHECKING:
    from densedino.pretrain.settings import RunConfig

__all__ = ["RECIPES", "list_recipes", "recipe"]

RECIPES: dict[str, tuple[str, str]] = {
    "debug": ("one_machine", "all three stages of a tiny model, in seconds on a CPU"),
    "vitt16_small": ("one_machine", "ViT-Ti/16 (5.5 M parameters) on 10 thousand images"),
    "vitt16_medium": ("one_machine", "ViT-Ti/16 on 100 thousand images"),
    "vitt16_large": ("one_machine", "ViT-Ti/16 on a million images"),
    "vits16_small": ("one_machine", "ViT-S/16 (22 M) on 10 thousand images"),
    "vits16_medium": ("one_machine", "ViT-S/16 on 100 thousand images"),
    "vits16_large": ("one_machine", "ViT-S/16 on a million images"),
    "vitb16_small": ("one_machine", "ViT-B/16 (86 M) on 10 thousand images"),
    "vitb16_medium": ("one_machine", "ViT-B/16 on 100 thousand images"),
    "vitb16_large": ("one_machine", "ViT-B/16 on a million images"),
    "vitt16_continue": ("one_machine", "the package's own vitt16, trained on with your images"),
    "vits16_continue": ("one_machine", "the released ViT-S/16, trained on with your images"),
    "vitb16_continue": ("one_machine", "the released ViT-B/16, trained on with your images"),
    "vitl16_continue": ("one_machine", "the released ViT-L/16, trained on with your images"),
    "vit7b16_pretrain": ("reference", "the paper's 7B model: a million steps of 4,096 images"),
    "vit7b16_gram": ("reference", "and then 200 thousand steps with Gram anchoring"),
    "vit7b16_highres": ("reference", "and then 30 thousand steps at up to 768 pixels"),
    "vitl16_in1k": ("reference", "ViT-L/16 on ImageNet-1k, 125 thousand steps of 2,048 images"),
}
"""Name → the module that has a function of this name, and what it is for."""


def list_recipes() -> list[str]:
    """Names of all recipes, ours first, then those of the paper's models."""
    return list(RECIPES)


def recipe(name: str) -> RunConfig:
    """The settings of the recipe `name`; variants by `dataclasses.replace`.

    Raises:
        UnknownNameError: no such recipe; the message names the nearest.
    """
    if name not in RECIPES:
        raise UnknownNameError("recipe", name, RECIPES)
    module = importlib.import_module(f"densedino.recipes.{RECIPES[name][0]}")
    config: RunConfig = getattr(module, name)()
    return config
