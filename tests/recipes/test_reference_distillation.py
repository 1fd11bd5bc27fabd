"""The numbers of the paper's distillation recipes, in effect at chosen steps."""

from __future__ import annotations

import json

import pytest

from densedino.config import from_dict, to_dict
from densedino.errors import UnknownNameError
from densedino.pretrain.distill import DistillConfig
from densedino.pretrain.step import step_values
from densedino.recipes import DISTILL_RECIPES, distill_recipe, recipe

ENDS = 625_000
IN_EFFECT = [  # recipe, step, lr in effect, weight decay, momentum, teacher temperature
    ("vit_distill", 0, 0.0, 0.04, 0.994, 0.07),
    ("vit_distill", 12_500, 2.634e-4, 0.04, 0.997, 0.07),
    ("vit_distill", 24_999, 2.634e-4, 0.04, 1.0, 0.07),
    ("convnext_tiny_distill", 0, 8e-6, 0.04, 0.994, 0.04),
    ("convnext_tiny_distill", 100_000, 1.6e-3, 0.0656, 0.99496, 0.06),
    ("convnext_small_distill", 100_000, 1.6e-3, 0.0656, 0.99496, 0.06),
    ("convnext_base_distill", 100_000, 8e-4, 0.0488, 0.99496, 0.06),
    ("convnext_large_distill", 100_000, 8e-4, 0.0656, 0.99496, 0.06),
    ("convnext_large_distill", 150_000, 7.82e-4, 0.0784, 0.99544, 0.07),
    ("convnext_large_distill", ENDS - 1, 8e-6, 0.2, 1.0, 0.07),
]


@pytest.mark.parametrize(("name", "step", "lr", "decay", "momentum", "temperature"), IN_EFFECT)
def test_values_in_effect(name, step, lr, decay, momentum, temperature) -> None:
    values = step_values(distill_recipe(name, teacher="run").stage, step)
    assert values.lr == pytest.approx(lr, rel=3e-3)
    assert values.weight_decay == pytest.approx(decay, rel=1e-3)
    assert values.momentum == pytest.approx(momentum, abs=1e-5)
    assert values.teacher_temperature == pytest.approx(temperature, abs=1e-5)


def test_constants() -> None:
    vit = distill_recipe("vit_distill", teacher="run")
    assert vit.students == ("vits16", "vits16plus", "vitb16", "vitl16")
    assert (vit.stage.steps, vit.stage.batch_size, vit.stage.optimizer.layer_decay) == (25_000, 1920, 0.99)
    assert vit.stage.rope.rescale == 2
    for name in DISTILL_RECIPES:
        config = distill_recipe(name, teacher="run")
        stage, crops = config.stage, config.stage.resolutions[0].crops
        assert (stage.optimizer.betas, stage.optimizer.clip, stage.drop_path) == ((0.9, 0.999), 3.0, 0.0)
        heads = (config.dino_head, config.ibot_head)
        assert [(h.hidden_dim, h.bottleneck_dim, h.num_prototypes) for h in heads] == [
            (8192, 512, 262_144),
            (4096, 384, 98_304),
        ]
        if "convnext" in name:
            assert (stage.steps, stage.batch_size, stage.optimizer.layer_decay) == (625_000, 4096, 1.0)
            assert (crops.global_size, crops.local_size, crops.stride, crops.hflip) == (512, 224, 32, 0.5)
            assert config.student_dino_head.num_prototypes == 262_144
            assert (config.student_dino_head.hidden_dim, config.student_dino_head.bottleneck_dim) == (2048, 256)
        else:
            assert (crops.global_size, crops.local_size, crops.stride, crops.hflip) == (256, 112, 16, 0.0)


@pytest.mark.parametrize("name", DISTILL_RECIPES)
def test_a_recipe_survives_json(name: str) -> None:
    config = distill_recipe(name, teacher="run")
    assert from_dict(DistillConfig, json.loads(json.dumps(to_dict(config)))) == config


def test_names_are_strict_and_say_where_to_look() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'convnext_base_distill'"):
        distill_recipe("convnext_base_distil", teacher="run")
    with pytest.raises(UnknownNameError, match="needs a teacher"):
        recipe("vit_distill")
