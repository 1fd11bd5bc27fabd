from __future__ import annotations

import json
from dataclasses import fields, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from densedino.config import from_dict, to_dict
from densedino.errors import InputError, UnknownNameError
from densedino.models.catalog import model_spec
from densedino.models.rope import RopeAugment
from densedino.pretrain.schedules import constant
from densedino.pretrain.settings import (
    DataConfig,
    GramConfig,
    HeadConfig,
    LossConfig,
    MaskConfig,
    MonitorConfig,
    OptimizerConfig,
    RunConfig,
    SnapshotConfig,
    SourceConfig,
    StageConfig,
)
from densedino.recipes import recipe

LR = {"lr": constant(1e-3)}
REFUSED = [
    (HeadConfig, {"num_prototypes": 1}, "num_prototypes is 1; valid: at least 2"),
    (HeadConfig, {"num_layers": 0}, "num_layers is 0"),
    (MaskConfig, {"probability": 1.5}, "probability is 1.5; valid: 0 to 1"),
    (MaskConfig, {"ratio": (0.5, 0.1)}, "two rising shares"),
    (GramConfig, {"remove_neg": True, "remove_only_teacher_neg": True}, "exclude each other"),
    (GramConfig, {"tokens_used": "masked"}, "Set img_level=False"),
    (GramConfig, {"source": "ema", "first_update": 10}, "do nothing there"),
    (GramConfig, {"source": "ema", "checkpoint": "a.pth"}, "do nothing there"),
    (GramConfig, {"update_every": 10}, "without first_update"),
    (GramConfig, {"first_update": 5, "max_updates": 0}, "max_updates is 0"),
    (LossConfig, {"koleo_weight": -0.1}, "koleo_weight is -0.1"),
    (LossConfig, {"koleo_group_size": 1}, "koleo_group_size is 1"),
    (LossConfig, {"dino_weight": float("nan")}, "dino_weight is nan"),
    (OptimizerConfig, LR | {"betas": (0.9, 1.0)}, "betas are"),
    (OptimizerConfig, LR | {"layer_decay": 1.1}, "layer_decay is 1.1"),
    (OptimizerConfig, LR | {"clip": 0.0}, "clip is 0.0"),
    (SnapshotConfig, {"keep": 0}, "keep is 0"),
    (MonitorConfig, {"log_every": 0}, "log_every is 0"),
    (SourceConfig, {"path": "x", "weight": 0.0}, "weight is 0.0"),
    (DataConfig, {"workers": -1}, "workers is -1"),
]


@pytest.mark.parametrize(("cls", "values", "message"), REFUSED)
def test_what_cannot_be_is_refused_with_the_value_and_the_fix(cls, values, message) -> None:
    with pytest.raises(InputError, match=message):
        cls(**values)
    with pytest.raises(InputError, match=message):  # and the same from a file
        from_dict(cls, {name: to_dict(v) if name == "lr" else v for name, v in values.items()} | kind(values))


def kind(values: dict[str, object]) -> dict[str, object]:
    return {"lr": {"kind": "StagedSchedule"} | to_dict(values["lr"])} if "lr" in values else {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"drop_path": 1.0}, "drop_path is 1.0"),
        ({"resolutions": ()}, "no resolutions"),
        ({"name": "a/b"}, "folder's name"),
    ],
)
def test_stages_are_refused(changes, message) -> None:
    stage = recipe("debug").stages[0]
    with pytest.raises(InputError, match=message):
        replace(stage, **changes)


def test_runs_are_refused() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'vits16'"):
        replace(recipe("debug"), model="vits_16")
    with pytest.raises(InputError, match="at least one stage"):
        replace(recipe("debug"), stages=())
    with pytest.raises(InputError, match="micro_batch_size is 0"):
        replace(recipe("debug"), micro_batch_size=0)


@settings(deadline=None, max_examples=60)
@given(st.floats(allow_nan=True, allow_infinity=True))
def test_a_probability_is_in_its_range_or_refused(value: float) -> None:
    if 0 <= value <= 1:
        assert MaskConfig(probability=value).probability == value
    else:
        with pytest.raises(InputError, match="probability"):
            MaskConfig(probability=value)


def test_a_specification_may_stand_for_a_model() -> None:
    spec = replace(model_spec("debug_vit"), depth=3, name="mine")
    config = replace(recipe("debug"), model=spec)
    assert config.spec.depth == 3
    read = from_dict(RunConfig, json.loads(json.dumps(to_dict(config))))
    assert read == config
    assert recipe("debug").spec == model_spec("debug_vit")


def test_fidelity_is_one_switch() -> None:
    config = recipe("debug")
    paper = config.with_fidelity("paper")
    assert config.fidelity == "released"
    for stage, other in zip(config.stages, paper.stages, strict=True):
        assert stage.rope == RopeAugment(rescale=2.0, per_block=True)
        assert other.rope == RopeAugment(rescale=2.0, per_block=False)
        assert stage.resolutions[0].crops.blur_probabilities == (0.0, 0.9, 0.5)
        assert other.resolutions[0].crops.blur_probabilities == (1.0, 0.1, 0.5)
        assert replace(other, rope=stage.rope, resolutions=stage.resolutions) == stage


def test_every_field_says_what_it_is_or_is_said_by_its_class() -> None:
    assert {field.name for field in fields(StageConfig)} >= {"name", "steps", "batch_size", "start", "inflate"}
