from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from densedino.models.catalog import list_models
from densedino.pretrain.schedules import constant
from densedino.pretrain.settings import OptimizerConfig
from densedino.pretrain.student_teacher import StudentTeacher, make_optimizer
from densedino.recipes import recipe


@pytest.mark.parametrize("model", list_models("debug_*"))
def test_names_are_those_of_the_checkpoints(model: str) -> None:
    state = StudentTeacher(replace(recipe("debug"), model=model, in_chans=5))
    names = set(state.state_dict())
    parts = ("backbone", "dino_head", "ibot_head")
    assert {tuple(name.split(".")[:2]) for name in names} == {(n, p) for n in ("student", "teacher") for p in parts}
    state.set_gram_teacher(state.teacher.backbone)
    added = set(state.state_dict()) - names
    assert {name.removeprefix("gram_teacher.") for name in added} == set(state.student.backbone.state_dict())
    state.set_gram_teacher(None)
    assert set(state.state_dict()) == names


def test_only_the_student_learns_and_teachers_stay_in_eval_mode() -> None:
    state = StudentTeacher(recipe("debug"))
    state.set_gram_teacher(state.teacher.backbone)
    assert all(p.requires_grad == name.startswith("student.") for name, p in state.named_parameters())
    for mode in (True, False):
        state.train(mode)
        assert state.student.backbone.training == mode
        assert not any(module.training for module in state.teacher.modules())
        assert not any(module.training for module in state.gram_teacher.modules())


def test_teachers_are_copies() -> None:
    state = StudentTeacher(recipe("debug"))
    state.set_gram_teacher(state.teacher.backbone)
    places = [parameter.data_ptr() for parameter in state.parameters()]
    assert len(places) == len(set(places))


def test_a_stage_goes_on_from_the_teacher() -> None:
    state = StudentTeacher(recipe("debug"))
    with torch.no_grad():
        for parameter in state.teacher.parameters():
            parameter.normal_()
    state.restart_from_teacher()
    for name, parameter in state.student.named_parameters():
        assert torch.equal(parameter, state.teacher.get_parameter(name))
        assert parameter.requires_grad


def test_seven_billion_parameters_are_shaped_without_memory() -> None:
    state = StudentTeacher(recipe("vit7b16_pretrain"), device="meta")
    assert sum(p.numel() for p in state.student.backbone.parameters()) == 6_716_043_264
    heads = [sum(p.numel() for p in head.parameters()) for head in (state.student.dino_head, state.student.ibot_head)]
    assert [round(head / 1e6) for head in heads] == [239, 73]


def test_the_optimizer_has_every_parameter_once() -> None:
    state = StudentTeacher(recipe("debug"))
    optimizer = make_optimizer(
        state.student, OptimizerConfig(lr=constant(1e-3), betas=(0.8, 0.95), layer_decay=0.5), fidelity="released"
    )
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in state.student.parameters()}
    assert len(held) == len(list(state.student.parameters()))
    assert {group["betas"] for group in optimizer.param_groups} == {(0.8, 0.95)}
    assert {group["lr_multiplier"] for group in optimizer.param_groups} == {1.0, 0.5, 0.25, 0.125, 0.025}
