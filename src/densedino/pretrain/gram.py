"""Owns the Gram teacher: where it comes from, when it is refreshed, and what the student is held to (DINOv3 §4)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from densedino.pretrain.losses import gram_loss, resize_tokens
from densedino.pretrain.optim import update_ema

if TYPE_CHECKING:
    from torch import Tensor

    from densedino.pretrain.settings import GramConfig
    from densedino.pretrain.student_teacher import StudentTeacher

__all__ = ["anchor_loss", "anchor_tokens", "is_refresh_due", "refresh"]


def is_refresh_due(gram: GramConfig, step: int) -> bool:
    """Whether the EMA teacher becomes the Gram teacher before `step` of the stage."""
    if gram.first_update is None or step < gram.first_update:
        return False
    since = step - gram.first_update
    number, rest = divmod(since, gram.update_every) if gram.update_every is not None else (0, since)
    return rest == 0 and (gram.max_updates is None or number < gram.max_updates)


def refresh(state: StudentTeacher, gram: GramConfig, *, step: int) -> bool:
    """Copy the EMA teacher's backbone into the Gram teacher if that is due before `step`; says whether it was."""
    due = state.gram_teacher is not None and is_refresh_due(gram, step)
    if due and state.gram_teacher is not None:
        update_ema(state.gram_teacher, state.teacher.backbone, momentum=0.0)
    return due


@torch.no_grad()
def anchor_tokens(state: StudentTeacher, crops: Tensor, *, grid: tuple[int, int]) -> Tensor:
    """The Gram teacher's normalised patch tokens [B, N, D] of crops [B, C, H, W], on the student's grid (h, w)."""
    assert state.gram_teacher is not None
    tokens = state.gram_teacher.training_features(crops)[1]
    stride = state.gram_teacher.stride
    own = (crops.shape[-2] // stride, crops.shape[-1] // stride)
    return resize_tokens(tokens, grid=own, to=grid)


def anchor_loss(student: Tensor, teacher: Tensor, gram: GramConfig, *, masks: Tensor) -> Tensor:
    """`gram_loss` with the options of the configuration: tokens [B, N, D], masks [B, N]."""
    return gram_loss(
        student,
        teacher,
        normalized=gram.normalized,
        img_level=gram.img_level,
        remove_neg=gram.remove_neg,
        remove_only_teacher_neg=gram.remove_only_teacher_neg,
        tokens_used=gram.tokens_used,
        masks=masks,
    )
