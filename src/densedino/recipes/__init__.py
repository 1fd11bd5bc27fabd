"""Recipes: functions that return the settings of a run, and nothing else."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from densedino.errors import UnknownNameError

if TYPE_CHECKING:
    from densedino.pretrain.distill import DistillConfig
    from densedino.pretrain.settings import RunConfig

__all__ = ["DISTILL_RECIPES", "RECIPES", "distill_recipe", "list_recipes", "recipe"]

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

DISTILL_RECIPES: dict[str, tuple[str, str]] = {
    "vit_distill": ("reference_distillation", "the paper's ViT-S, S+, B and L at once, from a teacher's prototypes"),
    "convnext_tiny_distill": ("reference_distillation", "the paper's ConvNeXt-T, at twice its teacher's resolution"),
    "convnext_small_distill": ("reference_distillation", "the paper's ConvNeXt-S"),
    "convnext_base_distill": ("reference_distillation", "the paper's ConvNeXt-B"),
    "convnext_large_distill": ("reference_distillation", "the paper's ConvNeXt-L"),
}
"""The same, of recipes that need a teacher."""


def list_recipes() -> list[str]:
    """Names of all recipes, ours first, then those of the paper's models."""
    return list(RECIPES)


def recipe(name: str) -> RunConfig:
    """The settings of the recipe `name`; variants by `dataclasses.replace`.

    Raises:
        UnknownNameError: no such recipe; the message names the nearest.
    """
    if name not in RECIPES:
        hint = f"{name!r} needs a teacher: densedino.recipes.distill_recipe." if name in DISTILL_RECIPES else ""
        raise UnknownNameError("recipe", name, RECIPES, hint=hint)
    module = importlib.import_module(f"densedino.recipes.{RECIPES[name][0]}")
    config: RunConfig = getattr(module, name)()
    return config


def distill_recipe(name: str, *, teacher: str) -> DistillConfig:
    """The settings of the distillation recipe `name`, from the run in the folder `teacher`.

    Raises:
        UnknownNameError: no such recipe; the message names the nearest.
    """
    if name not in DISTILL_RECIPES:
        raise UnknownNameError("distillation recipe", name, DISTILL_RECIPES)
    module = importlib.import_module(f"densedino.recipes.{DISTILL_RECIPES[name][0]}")
    config: DistillConfig = getattr(module, name)(teacher)
    return config
