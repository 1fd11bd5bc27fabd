from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from densedino.pretrain import cost
from densedino.pretrain.settings import HeadConfig
from densedino.pretrain.student_teacher import StudentTeacher
from densedino.recipes import recipe

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["debug", "vitt16_small"])
def test_the_state_is_counted_to_the_byte(name):
    run = recipe(name)
    head = HeadConfig(hidden_dim=32, num_prototypes=64)
    run = replace(run, dino_head=head, ibot_head=replace(head, num_layers=2))
    state = StudentTeacher(run)
    state.set_gram_teacher(state.teacher.backbone)
    sizes = {part: sum(p.nbytes for p in module.parameters()) for part, module in state.named_children()}
    assert cost.state_bytes(run) == 4 * sizes["student"] + sizes["teacher"] + sizes["gram_teacher"]
    heads = sum(p.numel() for part in ("dino_head", "ibot_head") for p in state.student.parts()[part].parameters())
    assert heads == sum(cost.head_parameters(h, run.spec.embed_dim) for h in (run.dino_head, run.ibot_head))


def test_activations_go_with_tokens_and_with_recomputation():
    run = recipe("vitt16_small")
    crops = run.stages[0].resolutions[0].crops
    plain = cost.activation_bytes(run, crops)
    # Global crops: 2 × 64 patches and 5 more tokens; local ones: 8 × 16 and 5. The larger part counts.
    assert plain == 8 * 21 * 12 * 192 * 12 * 4
    assert cost.activation_bytes(replace(run, activation_checkpointing="full"), crops) < plain / 4
    assert cost.activation_bytes(run, replace(crops, local_size=96)) > 1.5 * plain
    assert cost.activation_bytes(replace(run, model="convnext_tiny"), crops) > plain


@pytest.mark.parametrize("gib", [4, 16, 128])
def test_micro_batches_fit_the_machine_in_whole_groups(monkeypatch, gib):
    run = recipe("vitb16_large")
    monkeypatch.setattr(cost, "machine_memory", lambda _: gib << 30)
    micro = cost.fitting_micro_batch(run, device=CPU)
    groups = {stage.losses.koleo_group_size for stage in run.stages}
    assert micro is not None
    assert all(micro % group == 0 for group in groups if group)
    if gib == 128:
        need = max(cost.memory_bytes(run, stage, micro_batch=micro, device=CPU) for stage in run.stages)
        assert need < 0.6 * gib * 2**30


def test_where_all_fits_nothing_is_split(monkeypatch):
    monkeypatch.setattr(cost, "machine_memory", lambda _: 16 << 30)
    assert cost.fitting_micro_batch(recipe("debug"), device=CPU) is None
    assert cost.fitting_micro_batch(recipe("vitt16_small"), device=CPU) is None


def test_the_machine_has_memory():
    assert cost.machine_memory(CPU) > 1 << 28


def test_speed_is_that_of_real_steps_and_not_measured_where_that_takes_long():
    run = recipe("debug")
    rate = cost.measure_rate(run, device=CPU)
    assert rate is not None
    assert rate > 1e5
    assert cost.measure_rate(recipe("vit7b16_pretrain"), device=CPU) is None


def test_work_goes_with_crops_and_teachers():
    run = recipe("debug")
    pretrain, gram = run.stages[:2]
    crops = pretrain.resolutions[0].crops
    work = cost.image_multiplications(run, pretrain, crops)
    assert cost.image_multiplications(run, pretrain, replace(crops, global_size=64)) > 1.2 * work
    assert cost.image_multiplications(run, gram, gram.resolutions[0].crops) > work
