from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import save_file

from densedino.errors import InputError
from densedino.models.catalog import create_model, list_models
from densedino.pretrain.crops import CropConfig
from densedino.pretrain.schedules import constant
from densedino.pretrain.settings import (
    GramConfig,
    HeadConfig,
    LossConfig,
    OptimizerConfig,
    Resolution,
    RunConfig,
    StageConfig,
)
from densedino.pretrain.starting import begin_stage, inflate
from densedino.pretrain.student_teacher import StudentTeacher

if TYPE_CHECKING:
    from pathlib import Path


def run(model: str = "debug_vit", *, in_chans: int = 3, starts: tuple[str, ...] = ("random",), **stage) -> RunConfig:
    crops = CropConfig(mean=(0.5,) * in_chans, std=(0.5,) * in_chans, rgb=None if in_chans < 3 else (0, 1, 2))
    head = HeadConfig(hidden_dim=16, bottleneck_dim=8, num_prototypes=32)
    return RunConfig(
        model=model,
        in_chans=in_chans,
        dino_head=head,
        ibot_head=head,
        stages=tuple(
            StageConfig(
                name=str(number),
                steps=3,
                batch_size=4,
                resolutions=(Resolution(crops=crops),),
                optimizer=OptimizerConfig(lr=constant(1e-3)),
                start=start,
                **stage,
            )
            for number, start in enumerate(starts)
        ),
    )


def weights_file(folder: Path, model: str, **options: int) -> tuple[str, torch.nn.Module]:
    backbone = create_model(model, **options)
    path = folder / "weights.safetensors"
    save_file(backbone.state_dict(), path)
    return str(path), backbone


def scramble(module: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_random_weights_are_the_seeds_and_equal_in_student_and_teacher() -> None:
    config = run()
    state = StudentTeacher(config)
    fresh = StudentTeacher(config)
    assert same(state, fresh)
    assert not same(state, StudentTeacher(replace(config, seed=1)))
    scramble(state)
    lines = begin_stage(state, config, stage=0)
    assert same(state, fresh)
    assert same(state.student, state.teacher)
    assert "random, seed 0" in lines[0]
    assert not any(parameter.requires_grad for parameter in state.teacher.parameters())


def test_drawing_weights_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    StudentTeacher(run())
    assert torch.equal(torch.rand(2), expected)


def test_a_later_stage_starts_student_and_gram_teacher_from_the_teacher() -> None:
    config = run(starts=("random", "previous"), losses=LossConfig(gram=GramConfig()))
    state = StudentTeacher(config)
    scramble(state.teacher)
    lines = begin_stage(state, config, stage=1)
    assert same(state.student, state.teacher)
    assert state.gram_teacher is not None
    assert same(state.gram_teacher, state.teacher.backbone)
    assert state.gram_teacher is not state.teacher.backbone
    assert "stage '0'" in lines[0]
    assert "copy of the teacher" in lines[1]
    state.train()
    assert not state.gram_teacher.training
    assert not state.teacher.training
    with pytest.raises(InputError, match="first stage"):
        begin_stage(state, run(starts=("previous",)), stage=0)


@pytest.mark.parametrize("model", list_models("debug_*"))
def test_a_stage_starts_from_any_file_of_its_model_with_fresh_heads(tmp_path: Path, model: str) -> None:
    path, backbone = weights_file(tmp_path, model)
    config = run(model, starts=(path,))
    state = StudentTeacher(config)
    lines = begin_stage(state, config, stage=0)
    assert same(state.student.backbone, backbone)
    assert same(state.teacher.backbone, backbone)
    assert same(state.student.dino_head, StudentTeacher(config).student.dino_head)
    assert path in lines[0]
    assert "heads: fresh" in lines[-1]


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    path, _ = weights_file(tmp_path, "debug_vit_swiglu")
    config = run("debug_vit", starts=(path,))
    with pytest.raises(InputError, match=r"holds a debug_vit_swiglu.*Set model='debug_vit_swiglu'"):
        begin_stage(StudentTeacher(config), config, stage=0)


def test_a_gram_teacher_may_be_a_file_or_the_ema_teacher(tmp_path: Path) -> None:
    path, backbone = weights_file(tmp_path, "debug_vit")
    config = run(losses=LossConfig(gram=GramConfig(checkpoint=path)))
    state = StudentTeacher(config)
    lines = begin_stage(state, config, stage=0)
    assert state.gram_teacher is not None
    assert same(state.gram_teacher, backbone)
    assert lines[-1].startswith("Gram teacher: debug_vit")
    config = run(losses=LossConfig(gram=GramConfig(source="ema")))
    assert "EMA teacher itself" in begin_stage(state, config, stage=0)[-1]
    assert state.gram_teacher is None


@pytest.mark.parametrize("model", ["debug_vit", "debug_convnext"])
@pytest.mark.parametrize("in_chans", [1, 5])
def test_other_channels_are_inflated_and_grey_pictures_look_as_before(
    tmp_path: Path, model: str, in_chans: int
) -> None:
    path, backbone = weights_file(tmp_path, model)
    config = run(model, in_chans=in_chans, starts=(path,))
    state = StudentTeacher(config)
    lines = begin_stage(state, config, stage=0)
    grey = torch.randn(2, 1, 64, 64)
    torch.testing.assert_close(
        state.student.backbone(grey.expand(-1, in_chans, -1, -1)),
        backbone(grey.expand(-1, 3, -1, -1)),
        rtol=1e-4,
        atol=1e-5,
    )
    assert f"3 → {in_chans} channels, mean" in lines[1]


def test_inflation_puts_colours_where_they_are() -> None:
    weight = torch.randn(6, 3, 4, 4)
    mean = inflate(weight, in_chans=5, rgb=(3, 2, 1), how="mean") * (5 / 3)
    torch.testing.assert_close(mean[:, [3, 2, 1]], weight)
    torch.testing.assert_close(mean[:, 0], weight.mean(1))
    torch.testing.assert_close(mean[:, 4], weight.mean(1))
    copied = inflate(weight, in_chans=5, rgb=None, how="copy") * (5 / 3)
    torch.testing.assert_close(copied, weight[:, [0, 1, 2, 0, 1]])
    zero = inflate(weight, in_chans=5, rgb=(3, 2, 1), how="zero")
    torch.testing.assert_close(zero[:, [3, 2, 1]], weight)
    assert (zero[:, [0, 4]] == 0).all()
    with pytest.raises(InputError, match="leaves nothing"):
        inflate(weight, in_chans=5, rgb=None, how="zero")
