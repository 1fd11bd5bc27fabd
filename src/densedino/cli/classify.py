"""Owns `densedino classify`: pictures in, names of what they show out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from densedino.cli.answering import AS_PUBLISHED, ModelOptions, Run, load_model
from densedino.cli.options import parse_resize
from densedino.errors import InputError

__all__ = ["run"]


def run(
    inputs: Annotated[tuple[str, ...], tyro.conf.Positional],
    *,
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("classes"),
    head: Annotated[ModelOptions, tyro.conf.arg(name="")] = AS_PUBLISHED,
    top: int = 5,
    resize: str | None = None,
    every: int = 1,
) -> int:
    """Say which of ImageNet's 1,000 classes pictures show, with a released linear head.

    A folder: densedino classify photos/ --weights dinov3_vit7b16_imagenet1k_linear_head-90d8ed92.pth
        --backbone-weights dinov3_vit7b16_pretrain_lvd1689m-a955f4ea.pth --engine stream -o classes/

    The folder gets a record per picture, and classes.csv. The same command again goes on after an interruption.

    Args:
        inputs: files, folders, patterns, .txt lists of paths, videos.
        out: the folder for the answers.
        head: which model, run how.
        top: how many classes are told, the most probable first.
        resize: what the model sees: 512x768 (height x width); as published if not given: 256 pixels on the short side,
            of which the middle 224.
        every: of the frames of a video, take each so many-th.
    """
    size = parse_resize(resize) if resize is not None else None
    if top < 1:
        raise InputError(f"--top {top}: tell at least 1 class.")
    if isinstance(size, int):
        raise InputError(f"--resize {resize}: give height x width, such as 256x256.")
    model = load_model(head, task="classify", default="vit7b16-imagenet1k-linear", resize=size)

    from densedino.tasks.answering import classes_csv, classifying

    go = Run(inputs, out, model, {"top": top, "resize": resize}, every)
    return go(classifying(model, top=top), table=("classes.csv", classes_csv))
