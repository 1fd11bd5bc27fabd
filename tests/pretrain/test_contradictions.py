from __future__ import annotations

from dataclasses import replace

import pytest

from densedino.errors import InputError
from densedino.models.rope import RopeAugment
from densedino.pretrain.contradictions import find_contradictions, validate
from densedino.pretrain.schedules import CosineSchedule, StagedSchedule, constant
from densedino.pretrain.settings import GramConfig, LossConfig, Resolution, RunConfig
from densedino.recipes import recipe


def with_stage(number: int = 0, **changes) -> RunConfig:
    config = recipe("debug")
    stages = list(config.stages)
    stages[number] = replace(stages[number], **changes)
    return replace(config, stages=tuple(stages))


def with_crops(number: int = 0, **changes) -> RunConfig:
    crops = recipe("debug").stages[number].resolutions[0].crops
    return with_stage(number, resolutions=(Resolution(crops=replace(crops, **changes)),))


def with_optimizer(**changes) -> RunConfig:
    return with_stage(optimizer=replace(recipe("debug").stages[0].optimizer, **changes))


@pytest.mark.parametrize(
    ("config", "world_size", "message"),
    [
        (with_stage(start="previous"), 1, "no stage comes before"),
        (with_stage(1, name="pretrain"), 1, "give each its own name"),
        (replace(recipe("debug"), in_chans=4), 1, "mean has 3 channels, in_chans is 4"),
        (with_crops(global_size=40), 1, "global_size=40 is no multiple of debug_vit's stride 16. Use 32"),
        (with_crops(local_size=7), 1, "Use 16"),
        (with_crops(num_global=1, num_local=0), 1, "no pair to compare"),
        (with_crops(local_from_global=True, stride=8), 1, "Set it to 16"),
        (with_crops(fidelity="paper"), 1, "with_fidelity"),
        (with_crops(gram_size=64), 1, "nobody sees such crops"),
        (with_stage(1, losses=LossConfig(koleo_weight=0, gram=GramConfig(source="ema"))), 1, "gram_size=None"),
        (with_stage(losses=LossConfig(dino_weight=0, ibot_weight=0, koleo_weight=0)), 1, "nothing is learnt"),
        (with_stage(losses=LossConfig(koleo_group_size=4, koleo_topk=4)), 1, "at most 3"),
        (with_stage(1, losses=LossConfig(gram=GramConfig(first_update=1000))), 1, "after the stage's 20 steps"),
        (with_optimizer(lr=CosineSchedule(base=1, final=0, total_steps=7)), 1, "total_steps=7, but the stage has 40"),
        (with_optimizer(lr=StagedSchedule(start=0, peak=1, end=1, warmup_steps=40)), 1, "it never ends"),
        (with_optimizer(momentum=constant(1.2)), 1, "valid: 0 to 1"),
        (with_optimizer(teacher_temperature=constant(0.0)), 1, "teacher_temperature goes through"),
        (with_optimizer(last_layer_freeze_steps=40), 1, "never learn"),
        (with_stage(frozen_backbone_steps=41), 1, "Use at most as many"),
        (with_stage(rope=RopeAugment(rescale=2.0)), 1, "per_block=False"),
        (replace(recipe("debug"), model="debug_convnext"), 1, "is a ConvNeXt"),
        (recipe("debug"), 3, "cannot be shared by 3 processes"),
        (replace(recipe("debug"), micro_batch_size=6), 1, "KoLeo's groups of 16"),
        (with_stage(batch_size=1, losses=LossConfig()), 1, "divisor of at least 2"),
        (
            with_stage(losses=LossConfig(koleo_distributed=False, koleo_group_size=16)),
            2,
            "groups of 16 samples do not divide the 8",
        ),
    ],
)
def test_a_contradiction_is_found_with_its_place_and_a_way_out(
    config: RunConfig, world_size: int, message: str
) -> None:
    found = find_contradictions(config, world_size=world_size)
    assert any(message in problem for problem in found), found
    with pytest.raises(InputError):
        validate(config, world_size=world_size)


def test_all_are_reported_at_once() -> None:
    config = replace(with_stage(1, frozen_backbone_steps=50), in_chans=4)
    with pytest.raises(InputError, match=r"5 contradictions") as caught:
        validate(config)
    assert str(caught.value).count("\n") == 5
    assert "stages[1] (gram): frozen_backbone_steps" in str(caught.value)


def test_a_sound_run_is_sound_on_any_number_of_processes() -> None:
    for world_size in (1, 2, 4, 8):
        validate(recipe("debug"), world_size=world_size)
