from __future__ import annotations

import pytest
import torch
from torch import nn

from densedino.errors import InputError
from densedino.models.catalog import create_model
from densedino.pretrain.crops import CropConfig, make_crops, stack_crops
from densedino.pretrain.feature_distill import (
    FeatureHead,
    FeatureState,
    TeacherConfig,
    distance,
    feature_losses,
    feature_step,
    fit_heads,
    principal_components,
    resize_map,
)
from densedino.pretrain.optim import adamw, parameter_groups
from densedino.pretrain.schedules import constant
from densedino.pretrain.settings import OptimizerConfig, Resolution, StageConfig
from densedino.pretrain.step import Batch, step_values
from densedino.pretrain.teachers import Tokens

CROPS = CropConfig(mean=(0.5,) * 3, std=(0.25,) * 3, global_size=64, num_global=1, num_local=0)
STAGE = StageConfig(
    name="distill",
    steps=8,
    batch_size=4,
    resolutions=(Resolution(crops=CROPS),),
    optimizer=OptimizerConfig(lr=constant(1e-3), lr_scaling="none", momentum=constant(0.9)),
    start="random",
)


def batch(seed=0, images=4):
    generator = torch.Generator().manual_seed(seed)
    crops = [
        make_crops(torch.rand(3, 80, 80, generator=generator), CROPS, seed=seed, step=0, index=i) for i in range(images)
    ]
    return Batch(
        crops=stack_crops(crops),
        masks=torch.zeros(1, images, 16, dtype=torch.bool),
        sample_ids=tuple(f"s{i}" for i in range(images)),
        places=range(images),
    )


def ask(one):
    """A teacher with a pyramid and without CLS."""
    x = one.crops.global_crops.flatten(0, 1)
    fine = torch.nn.functional.avg_pool2d(x, 4)
    return Tokens(cls=None, maps=(torch.cat([fine, fine.square()], 1), torch.nn.functional.avg_pool2d(x, 16)))


class Pyramid(nn.Module):
    """A CNN of two levels, nothing of ours."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 12, 2, 2)

    def forward(self, x):
        fine = self.one(x).relu()
        return [fine, self.two(fine).relu()]


def test_principal_components_are_uncorrelated_and_of_mean_square_one():
    torch.manual_seed(0)
    x = torch.randn(500, 6) @ torch.randn(6, 6) * torch.tensor([1e3, 1, 1, 1, 1, 1e-2]) + 5
    mean, basis = principal_components(x, components=4)
    z = (x - mean) @ basis
    covariance = z.T @ z / len(z)
    assert basis.shape == (6, 4)
    torch.testing.assert_close(covariance, covariance.diag().diag(), atol=2e-3, rtol=0)
    assert z.square().mean() == pytest.approx(1, abs=0.01)
    assert (covariance.diag().diff() <= 1e-3).all()


def test_resizing_keeps_positions_and_takes_means():
    rows = ((torch.arange(8.0) + 0.5) / 8).view(1, 1, 8, 1).expand(1, 1, 8, 8)
    assert resize_map(rows, (4, 4))[0, 0, 1:3, 0].tolist() == pytest.approx([3 / 8, 5 / 8])
    assert resize_map(rows, (16, 16))[0, 0, 4:12, 0].tolist() == pytest.approx(
        ((torch.arange(4, 12) + 0.5) / 16).tolist()
    )
    assert resize_map(rows, (8, 8)) is rows


def test_distances():
    a, b = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[0.0, 1.0], [0.0, 4.0]])
    assert distance(a, b, kind="cosine").item() == pytest.approx(0.5)
    assert distance(a, b, kind="smooth_l1").item() == pytest.approx((0.5 + 0.5 + 0 + 1.5) / 4)
    assert distance(a, b, kind="both").item() == pytest.approx(0.5 + 0.625)


def test_a_head_is_fitted_in_closed_form():
    torch.manual_seed(0)
    student = torch.randn(200, 5)
    teacher = student @ torch.randn(5, 7) + 3
    head = FeatureHead(5, *principal_components(teacher, components=5))
    assert head.fit(student, teacher, ridge=1e-6) > 0.999
    torch.testing.assert_close(head(student), head.target(teacher), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("make", [lambda: create_model("debug_vit"), lambda: create_model("debug_convnext"), Pyramid])
def test_any_network_learns_from_any_map(make):
    torch.manual_seed(0)
    teachers = (TeacherConfig(source="made", gram_weight=1.0), TeacherConfig(source="made", distance="smooth_l1"))
    state = FeatureState(make())
    told = fit_heads(state, [batch(s) for s in range(1, 5)], [ask, ask], teachers)
    levels = 2 if make is Pyramid else 1
    assert len(told) == 2 * (1 + 2 * levels)
    optimizer = adamw(parameter_groups(state.student.backbone, heads=[state.student.heads], fidelity="paper"))
    before = [p.clone() for p in state.teacher.parameters()]
    totals = []
    for step in range(STAGE.steps):
        report = feature_step(
            state, optimizer, [batch()], [ask, ask], teachers=teachers, stage=STAGE,
            values=step_values(STAGE, step), seed=0, step=step,
        )  # fmt: skip
        totals.append(report.losses["total"])
    assert totals[-1] < totals[0]
    assert report.losses.keys() == {"0_cls", "0_patch", "0_gram", "1_cls", "1_patch", "total"}
    assert not all(map(torch.equal, before, state.teacher.parameters()))  # the average follows


def test_micro_batches_make_the_same_step():
    teachers = (TeacherConfig(source="made", gram_weight=0.5, distance="smooth_l1"),)
    results = []
    for size in (None, 1):
        torch.manual_seed(0)
        state = FeatureState(create_model("debug_vit"))
        fit_heads(state, [batch(1)], [ask], teachers)
        optimizer = adamw(parameter_groups(state.student.backbone, heads=[state.student.heads], fidelity="paper"))
        report = feature_step(
            state, optimizer, batch().split(size), [ask], teachers=teachers, stage=STAGE,
            values=step_values(STAGE, 0), seed=0, step=0,
        )  # fmt: skip
        results.append((report.losses, report.gradient_norms))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-4)


def test_a_step_that_is_not_finite_changes_nothing():
    teachers = (TeacherConfig(source="made"),)
    state = FeatureState(create_model("debug_vit"))
    fit_heads(state, [batch(1)], [ask], teachers)
    optimizer = adamw(parameter_groups(state.student.backbone, heads=[state.student.heads], fidelity="paper"))
    bad = batch()
    bad.crops.global_crops[0, 2] = torch.nan
    before = {k: v.clone() for k, v in state.state_dict().items()}
    report = feature_step(
        state, optimizer, [bad], [ask], teachers=teachers, stage=STAGE, values=step_values(STAGE, 0), seed=0, step=0
    )
    assert (report.finite, report.suspects) == (False, ("s2",))
    assert all(torch.equal(v, before[k]) for k, v in state.state_dict().items())


def test_perfect_predictions_cost_nothing():
    target = ask(batch())
    state = FeatureState(Pyramid())
    fit_heads(state, [batch()], [ask], (TeacherConfig(source="made"),))
    heads = state.student.heads
    for key in ("0_1_0", "0_1_1", "0_cls"):
        heads[key].linear.weight.data.zero_()
    student = Tokens(cls=None, maps=(torch.zeros(4, 8, 4, 4), torch.zeros(4, 12, 2, 2)))
    terms, total = feature_losses(student, [target], heads, (TeacherConfig(source="made", cls_weight=0.0),))
    assert terms.keys() == {"0_patch"}
    assert total == terms["0_patch"]


def test_settings_that_teach_nothing_are_refused():
    with pytest.raises(InputError, match="one above it"):
        TeacherConfig(source="x", cls_weight=0, patch_weight=0)
    with pytest.raises(InputError, match="at least 1"):
        TeacherConfig(source="x", components=0)
