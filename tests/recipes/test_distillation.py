from __future__ import annotations

import pytest

from densedino.config import from_dict, to_dict
from densedino.models.catalog import model_spec
from densedino.pretrain.distill import DistillConfig
from densedino.pretrain.feature_distill import TeacherConfig
from densedino.pretrain.feature_run import FeatureDistillConfig
from densedino.recipes import recipe
from densedino.recipes.distillation import from_features, from_run


@pytest.mark.parametrize("model", ["vitt16", "convnext_tiny"])
def test_features_recipe_fits_its_student_and_survives_json(model):
    teachers = (TeacherConfig(source="a"), TeacherConfig(source="b.onnx", tensor="t"))
    config = from_features(teachers, model=model, steps=500)
    assert from_dict(FeatureDistillConfig, to_dict(config)) == config
    for resolution in config.stage.resolutions:
        assert resolution.crops.global_size % model_spec(model).stride == 0
        assert resolution.crops.gram_size == resolution.crops.global_size
    lr = config.stage.optimizer.lr
    assert lr(499) < lr(250) < lr(10) == 5e-4


def test_run_recipe_gives_every_network_the_teachers_grid():
    run = recipe("vits16_small")
    config = from_run("run", run, students=("vitt16", "convnext_tiny"))
    assert from_dict(DistillConfig, to_dict(config)) == config
    for ours, theirs in zip(config.stage.resolutions, run.stages[-1].resolutions, strict=True):
        assert ours.crops.stride == 32
        assert ours.crops.global_size == 2 * theirs.crops.global_size
        assert ours.crops.local_size == 2 * theirs.crops.local_size
        assert ours.crops.gram_size is None
    assert config.dino_head == run.dino_head
    alone = from_run("run", run)
    assert alone.stage.resolutions[0].crops.global_size == run.stages[-1].resolutions[0].crops.global_size
