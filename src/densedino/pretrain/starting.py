"""Owns the weights a stage starts from: random, the teacher of the stage before, or any backbone that loads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch

from densedino.errors import InputError
from densedino.models.catalog import MODELS, create_model
from densedino.pretrain.optim import update_ema
from densedino.pretrain.student_teacher import StudentTeacher
from densedino.weights.catalog import WEIGHTS
from densedino.weights.loading import load_weights

if TYPE_CHECKING:
    from torch import Tensor

    from densedino.models.convnext import ConvNeXt
    from densedino.models.vit import VisionTransformer
    from densedino.pretrain.settings import RunConfig, StageConfig

__all__ = ["begin_stage", "inflate"]

Inflation = Literal["mean", "copy", "zero"]


def begin_stage(state: StudentTeacher, config: RunConfig, *, stage: int) -> list[str]:
    """Bring student, teacher and Gram teacher to where stage number `stage` of the run starts, in place.

    Returns:
        What was loaded and what is fresh, a line each.

    Raises:
        InputError: the weights are of another architecture, or cannot be inflated as asked.
        WeightsError: they cannot be had or do not fit; see `load_weights`.
    """
    settings = config.stages[stage]
    if settings.start == "previous":
        if stage == 0:
            raise InputError("the first stage has start='previous'; set start='random', or to weights.")
        state.restart_from_teacher()
        before = config.stages[stage - 1].name
        lines = [f"student: backbone and heads of the EMA teacher at the end of stage {before!r}"]
    else:
        _redraw(state, config)
        heads = f"random, seed {config.seed}"
        lines = [f"student and teacher backbone: {heads}"]
        if settings.start != "random":
            backbone, lines = _load(settings.start, config, settings)
            state.student.backbone.load_state_dict(backbone.state_dict())
            state.teacher.backbone.load_state_dict(backbone.state_dict())
            lines[0] = f"student and teacher backbone: {lines[0]}"
        lines.append(f"student and teacher heads: fresh ({heads})")
    return lines + _begin_gram(state, config, settings)


def inflate(weight: Tensor, *, in_chans: int, rgb: tuple[int, int, int] | None, how: Inflation = "mean") -> Tensor:
    """A patch embedding's filters [D, c, p, p] for `in_chans` channels: [D, in_chans, p, p].

    Where c is 3, the channels `rgb` get the filters of red, green and blue. The others get the mean of all filters
    ("mean"), the filters in turn ("copy"), or zeros ("zero"). With "mean" and "copy" all are multiplied by
    c / in_chans, so that a picture whose channels are alike gives the response that it gave before.

    Raises:
        InputError: "zero" where no channel is red, green or blue: nothing would be left.
    """
    c = weight.shape[1]
    known = {place: colour for colour, place in enumerate(rgb or ())} if c == 3 else {}
    if how == "zero" and not known:
        raise InputError(
            f"inflate='zero' leaves nothing of {c}-channel weights where rgb={rgb}. Say which channels are red, green"
            " and blue (CropConfig.rgb), or use inflate='mean'."
        )
    extra = {"mean": lambda _: weight.mean(1), "copy": lambda i: weight[:, i % c], "zero": lambda _: 0 * weight[:, 0]}[
        how
    ]
    filters = torch.stack([weight[:, known[i]] if i in known else extra(i) for i in range(in_chans)], dim=1)
    return filters if how == "zero" else filters * (c / in_chans)


def _begin_gram(state: StudentTeacher, config: RunConfig, stage: StageConfig) -> list[str]:
    gram = stage.losses.gram
    if gram is None or gram.source == "ema":
        state.set_gram_teacher(None)
        return [] if gram is None else ["Gram teacher: the EMA teacher itself"]
    if gram.checkpoint is None:
        state.set_gram_teacher(state.teacher.backbone)
        return ["Gram teacher: a copy of the teacher with which the stage starts"]
    backbone, lines = _load(gram.checkpoint, config, stage)
    state.set_gram_teacher(backbone.to(next(state.teacher.parameters()).device))
    return [f"Gram teacher: {lines[0]}", *lines[1:]]


def _redraw(state: StudentTeacher, config: RunConfig) -> None:
    """Student and teacher as they are at the start of a run."""
    fresh = StudentTeacher(config)
    with torch.no_grad():
        for ours, theirs in zip(state.student.parameters(), fresh.student.parameters(), strict=True):
            ours.copy_(theirs)
    update_ema(state.teacher, state.student, momentum=0.0)


def _load(source: str, config: RunConfig, stage: StageConfig) -> tuple[VisionTransformer | ConvNeXt, list[str]]:
    """A backbone with the channels of the run, fp32 on the CPU, and what is to be said about it."""
    named = source in MODELS or source in WEIGHTS
    backbone, card = load_weights(source if named else None, weights=None if named else source, dtype=torch.float32)
    if backbone.spec != config.spec:
        raise InputError(
            f"{source!r} holds a {backbone.spec.name}, but the run trains a {config.spec.name}"
            f"{'' if backbone.spec.name != config.spec.name else ' with other numbers'}. Set model={card.model!r}, or"
            " start from weights of the model."
        )
    lines = [f"{card.name} from {card.source} ({card.licence}; {card.data})"]
    if card.in_chans != config.in_chans:
        rgb = stage.resolutions[0].crops.rgb
        state = backbone.state_dict()
        name = next(name for name in ("patch_embed.proj.weight", "downsample_layers.0.0.weight") if name in state)
        state[name] = inflate(state[name], in_chans=config.in_chans, rgb=rgb, how=stage.inflate)
        backbone = create_model(config.spec, in_chans=config.in_chans, device="meta")
        backbone.load_state_dict(state, assign=True)
        lines.append(f"patch embedding: {card.in_chans} → {config.in_chans} channels, {stage.inflate}, rgb={rgb}")
    return backbone, lines
