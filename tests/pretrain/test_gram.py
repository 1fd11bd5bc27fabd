from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from densedino.pretrain.gram import anchor_loss, anchor_tokens, is_refresh_due, refresh
from densedino.pretrain.losses import gram_loss, resize_tokens
from densedino.pretrain.settings import GramConfig
from densedino.pretrain.student_teacher import StudentTeacher
from densedino.recipes import recipe


@pytest.fixture
def state() -> StudentTeacher:
    state = StudentTeacher(recipe("debug"))
    state.set_gram_teacher(state.teacher.backbone)
    return state


def test_a_refreshment_copies_the_ema_teacher_when_it_is_due(state: StudentTeacher) -> None:
    gram = GramConfig(first_update=3)
    with torch.no_grad():
        state.teacher.backbone.cls_token += 1
    assert not refresh(state, gram, step=2)
    assert not torch.equal(state.gram_teacher.cls_token, state.teacher.backbone.cls_token)
    assert refresh(state, gram, step=3)
    assert torch.equal(state.gram_teacher.cls_token, state.teacher.backbone.cls_token)
    assert state.gram_teacher.cls_token is not state.teacher.backbone.cls_token
    state.set_gram_teacher(None)
    assert not refresh(state, gram, step=3)


def test_without_a_first_update_there_is_none() -> None:
    assert not any(is_refresh_due(GramConfig(), step) for step in range(100))


@pytest.mark.parametrize("size", [64, 96, 32])
def test_tokens_of_larger_crops_come_on_the_students_grid(state: StudentTeacher, size: int) -> None:
    crops = torch.randn(2, 3, size, size)
    tokens = anchor_tokens(state, crops, grid=(4, 4))
    own = state.gram_teacher.training_features(crops)[1]
    torch.testing.assert_close(tokens, resize_tokens(own, grid=(size // 16, size // 16), to=(4, 4)))
    assert tokens.shape == (2, 16, 32)
    assert not tokens.requires_grad


@pytest.mark.parametrize(
    "gram",
    [
        GramConfig(),
        GramConfig(normalized=False),
        GramConfig(img_level=False),
        GramConfig(remove_neg=True),
        GramConfig(remove_only_teacher_neg=True),
        GramConfig(img_level=False, tokens_used="masked"),
        GramConfig(img_level=False, tokens_used="unmasked"),
    ],
)
def test_every_option_has_its_effect(gram: GramConfig) -> None:
    student, teacher, masks = torch.randn(3, 9, 8), torch.randn(3, 9, 8), torch.rand(3, 9) > 0.5
    found = anchor_loss(student, teacher, gram, masks=masks)
    plain = gram_loss(student, teacher)
    assert torch.equal(found, plain) == (gram == GramConfig())
    if gram.tokens_used != "all":
        chosen = masks if gram.tokens_used == "masked" else ~masks
        expected = gram_loss(student[chosen][None], teacher[chosen][None])
        torch.testing.assert_close(found, expected)
        assert not torch.equal(found, anchor_loss(student, teacher, replace(gram, tokens_used="all"), masks=masks))
