from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import densedino as dd
from densedino.errors import InputError
from densedino.pretrain.crops import CropConfig, make_crops, stack_crops
from densedino.pretrain.distill import (
    DistillConfig,
    DistillJob,
    Students,
    at_stride,
    distill,
    distill_step,
    read_teacher,
)
from densedino.pretrain.passes import make_targets
from densedino.pretrain.schedules import constant
from densedino.pretrain.settings import (
    DataConfig,
    HeadConfig,
    LossConfig,
    MonitorConfig,
    OptimizerConfig,
    Resolution,
    RunConfig,
    SnapshotConfig,
    StageConfig,
)
from densedino.pretrain.step import Batch, step_values
from densedino.pretrain.student_teacher import make_optimizer
from densedino.pretrain.trainer import pretrain

HEAD = HeadConfig(hidden_dim=16, bottleneck_dim=8, num_prototypes=12)
CROPS = CropConfig(mean=(0.5,) * 3, std=(0.25,) * 3, global_size=128, local_size=64, num_local=2, stride=32)
STAGE = StageConfig(
    name="distill",
    steps=3,
    batch_size=2,
    resolutions=(Resolution(crops=CROPS),),
    optimizer=OptimizerConfig(lr=constant(1e-3), lr_scaling="none", momentum=constant(0.5)),
    losses=LossConfig(koleo_weight=0.0),
    start="random",
)
CONFIG = DistillConfig(
    students=("debug_vit", "debug_convnext"),
    teacher="nowhere",
    teacher_model="debug_vit",
    stage=STAGE,
    dino_head=HEAD,
    ibot_head=HEAD,
    data=DataConfig(workers=0),
    snapshots=SnapshotConfig(every=2),
    log_every=1,
)


class Made:
    def __len__(self):
        return 4

    def name(self, index):
        return f"made#{index}"

    def read(self, index):
        return torch.rand(3, 140, 150, generator=torch.Generator().manual_seed(index))


def batch():
    crops = [make_crops(Made().read(i), CROPS, seed=0, step=0, index=i) for i in range(2)]
    masks = torch.zeros(2, 2, 16, dtype=torch.bool)
    masks[:, :, 3:9] = True
    return Batch(crops=stack_crops(crops), masks=masks, sample_ids=("a", "b"), places=range(2))


def networks(seed):
    from densedino.pretrain.distill import _network

    return {name: _network(dd.models.catalog.model_spec(name), CONFIG, seed=seed) for name in CONFIG.students}


@pytest.fixture(scope="module")
def teacher_run(tmp_path_factory):
    """A run of two steps, whose teacher has heads."""
    stage = replace(
        STAGE,
        steps=2,
        resolutions=(Resolution(crops=replace(CROPS, global_size=32, local_size=16, stride=16)),),
    )
    run = RunConfig(
        model="debug_vit", stages=(stage,), dino_head=HEAD, ibot_head=HEAD, data=DataConfig(workers=0),
        monitor=MonitorConfig(look_every=100, images=4, size=32, tensorboard=False),
    )  # fmt: skip
    output = tmp_path_factory.mktemp("teacher") / "run"
    pretrain(run, output=output, sources=[Made()], device="cpu", say=lambda _: None)
    return output


def test_every_network_gets_the_same_grid():
    one = batch()
    half = at_stride(one, stride=16, made_for=32)
    assert half.crops.global_crops.shape[-2:] == (64, 64)
    assert half.crops.local_crops.shape[-2:] == (32, 32)
    assert at_stride(one, stride=32, made_for=32) is one
    # The patch under mask cell (row, column) shows the same part of the picture: a spot stays in its cell.
    spot = torch.zeros_like(one.crops.global_crops)
    spot[..., 32:64, 64:96] = 1.0
    small = at_stride(replace(one, crops=replace(one.crops, global_crops=spot)), stride=16, made_for=32)
    cells = small.crops.global_crops[0, 0, 0].unflatten(0, (4, 16)).unflatten(2, (4, 16)).mean((1, 3))
    assert cells.argmax() == 1 * 4 + 2
    assert cells[1, 2] > 0.9


def test_one_teacher_pass_serves_all_students_and_each_learns_as_if_alone():
    teacher = networks(9)["debug_vit"]
    values = step_values(STAGE, 0)

    def step(names):
        students = {name: one for name, one in networks(1).items() if name in names}
        state = Students(students, teacher)
        calls = []
        hook = teacher.backbone.register_forward_pre_hook(lambda *_: calls.append(1))
        optimizers = {n: make_optimizer(s, STAGE.optimizer, fidelity="released") for n, s in students.items()}
        reports = distill_step(state, optimizers, [batch()], stage=STAGE, values=values, seed=0, step=0, made_for=32)
        hook.remove()
        return state, reports

    both, reports = step(CONFIG.students)
    assert reports.keys() == set(CONFIG.students)
    assert all(r.finite and {"dino_global", "dino_local", "ibot"} <= r.losses.keys() for r in reports.values())
    for name in CONFIG.students:
        alone, report = step((name,))
        assert report[name].losses == reports[name].losses
        for key, value in alone.students[name].state_dict().items():
            assert torch.equal(value, both.students[name].state_dict()[key])


def test_targets_are_the_frozen_teachers_and_students_see_whole_crops():
    teacher = networks(9)["debug_vit"]
    state = Students({"debug_vit": networks(1)["debug_vit"]}, teacher)
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    optimizer = {"debug_vit": make_optimizer(state.pair("debug_vit")[0], STAGE.optimizer, fidelity="released")}
    one = batch()
    masked = []
    hook = state.pair("debug_vit")[0].backbone.patch_embed.register_forward_hook(lambda *_: masked.append(1))
    values = step_values(STAGE, 0)
    distill_step(state, optimizer, [one], stage=STAGE, values=values, seed=0, step=0, made_for=32)
    hook.remove()
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    shown = at_stride(one, stride=16, made_for=32)
    (targets,) = make_targets(teacher, [shown], temperature=values.teacher_temperature)
    assert len(targets.ibot) == one.masks.sum()
    assert not any(key.startswith("_teacher") or "teacher" in key for key in state.state_dict())


def test_a_run_ends_in_one_file_a_student_and_resumes_bit_for_bit(tmp_path, teacher_run):
    config = replace(CONFIG, teacher=str(teacher_run))
    quiet = {"sources": [Made()], "device": "cpu", "say": lambda _: None}
    whole = distill(config, output=tmp_path / "whole", **quiet)
    assert [path.name for path in whole.weights] == ["debug_vit.safetensors", "debug_convnext.safetensors"]
    distill(config, output=tmp_path / "parts", advance=_stop_at(1), **quiet)
    parts = distill(config, output=tmp_path / "parts", **quiet)
    for ours, theirs in zip(parts.weights, whole.weights, strict=True):
        mine, others = load_file(ours), load_file(theirs)
        assert all(torch.equal(mine[key], others[key]) for key in others)
    assert dd.load(weights=whole.weights[1]).card.model == "debug_convnext"


def _stop_at(step):
    import signal

    def advance(progress):
        if progress.step == step:
            signal.raise_signal(signal.SIGTERM)

    return advance


def test_the_teacher_is_that_of_the_snapshot_or_refused(teacher_run):
    teacher = read_teacher(replace(CONFIG, teacher=str(teacher_run)), say=lambda _: None)
    loaded = dd.load(weights=teacher_run / "model.safetensors").model
    assert torch.equal(teacher.backbone.cls_token, loaded.cls_token)
    wrong = replace(CONFIG, teacher=str(teacher_run), dino_head=replace(HEAD, num_prototypes=99))
    with pytest.raises(InputError, match=r"dino_head\.last_layer.*Set teacher_model"):
        read_teacher(wrong, say=lambda _: None)
    with pytest.raises(InputError, match="no snapshot with a teacher"):
        read_teacher(replace(CONFIG, teacher=str(teacher_run / "looks")), say=lambda _: None)


def test_contradictions_are_refused():
    with pytest.raises(InputError, match="each once"):
        replace(CONFIG, students=("debug_vit", "debug_vit"))
    with pytest.raises(InputError, match="strides \\[16, 32\\]: set it to 32"):
        replace(CONFIG, stage=replace(STAGE, resolutions=(Resolution(crops=replace(CROPS, stride=16)),)))
    students = networks(1)
    students["debug_vit"].dino_head = _other_head()
    with pytest.raises(InputError, match="has 7 prototypes and the teacher's 12"):
        Students({"debug_vit": students["debug_vit"]}, networks(9)["debug_vit"])


def _other_head():
    from densedino.pretrain.student_teacher import _head

    return _head(32, replace(HEAD, num_prototypes=7), "cpu")


def test_a_job_draws_students_by_the_seed():
    teacher = networks(9)["debug_vit"]
    one, same = (DistillJob(CONFIG, teacher) for _ in range(2))
    for (key, value), (_, other) in zip(one.model.state_dict().items(), same.model.state_dict().items(), strict=True):
        assert torch.equal(value, other), key
