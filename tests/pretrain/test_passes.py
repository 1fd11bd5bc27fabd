"""What the passes promise beyond the step as a whole (`test_step`, `test_trajectory`)."""

from __future__ import annotations

from dataclasses import replace

import torch

from densedino.pretrain.crops import Crops
from densedino.pretrain.passes import Passes, make_targets
from densedino.pretrain.settings import HeadConfig
from densedino.pretrain.step import Batch, step_values
from densedino.pretrain.student_teacher import StudentTeacher
from densedino.recipes import recipe


def state_and_batch(prototypes: int = 64) -> tuple[StudentTeacher, Batch]:
    head = HeadConfig(hidden_dim=16, bottleneck_dim=8, num_prototypes=prototypes)
    state = StudentTeacher(replace(recipe("debug"), dino_head=head, ibot_head=head))
    g = torch.Generator().manual_seed(0)
    crops = Crops(
        global_crops=torch.randn(2, 16, 3, 48, 48, generator=g), local_crops=torch.randn(4, 16, 3, 16, 16, generator=g)
    )
    masks = torch.rand(2, 16, 9, generator=g) > 0.5
    return state, Batch(crops=crops, masks=masks, sample_ids=tuple(map(str, range(16))), places=range(16))


def run(state: StudentTeacher, batch: Batch, **options) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    stage = recipe("debug").stages[0]
    targets = make_targets(state.teacher, [batch], temperature=0.07)
    values = replace(step_values(stage, 0), local_weight=options.pop("local_weight", 1.0))
    passes = Passes(student=state.student, stage=stage, values=values, seed=0, step=0, **options)
    losses, cls = passes.run([batch], targets)
    return losses[0], cls


def test_without_masks_the_student_sees_the_whole_crop() -> None:
    state, batch = state_and_batch()
    with torch.no_grad():
        state.student.backbone.mask_token.fill_(5.0)
    seen, hidden = run(state, batch, masked=False)[1], run(state, batch)[1]
    unmasked = replace(batch, masks=torch.zeros_like(batch.masks))
    torch.testing.assert_close(seen, run(state, unmasked)[1])
    assert not torch.allclose(seen, hidden)


def test_gradients_add_up() -> None:
    state, batch = state_and_batch()
    run(state, batch)
    once = [p.grad.clone() for p in state.student.parameters()]
    run(state, batch)
    for parameter, gradient in zip(state.student.parameters(), once, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * gradient)
    assert all(parameter.grad is None for parameter in state.teacher.parameters())


def test_the_teachers_patches_are_kept_where_they_are_asked_for() -> None:
    state, batch = state_and_batch()
    (kept,) = make_targets(state.teacher, [batch], temperature=0.07, keep_patches=True)
    (plain,) = make_targets(state.teacher, [batch], temperature=0.07)
    assert plain.patches is None
    assert kept.patches is not None
    assert kept.patches.shape == (32, 9, 32)
    torch.testing.assert_close(kept.ibot.features, plain.ibot.features)
    torch.testing.assert_close(kept.cls, plain.cls)
