"""Owns `densedino segment --model HEAD`: pictures in, the class of each of their pixels out, without labels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import tyro

from densedino.cli.answering import AS_PUBLISHED, ModelOptions, Run, load_model
from densedino.cli.options import parse_resize

__all__ = ["run"]


def run(
    inputs: Annotated[tuple[str, ...], tyro.conf.Positional],
    *,
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("segments"),
    head: Annotated[ModelOptions, tyro.conf.arg(name="")] = AS_PUBLISHED,
    augment: bool = False,
    resize: str | None = None,
    crop: int = 896,
    stride: int = 596,
    every: int = 1,
) -> int:
    """Tell which of ADE20K's 150 classes each pixel is, with a released Mask2Former head.

    A folder: densedino segment photos/ --model vit7b16-ade20k-m2f --engine stream -o segments/
        --weights dinov3_vit7b16_ade20k_m2f_head-bf307cb1.pth
        --backbone-weights dinov3_vit7b16_pretrain_lvd1689m-a955f4ea.pth

    For each picture the folder gets NAME.classes.png (class numbers, the picture's own size), a sheet to look at, and a
    record with the share of each class. The same command again goes on after an interruption.

    Args:
        inputs: files, folders, patterns, .txt lists of paths, videos.
        out: the folder for the answers.
        head: which model, run how.
        augment: average over five scales and their mirror images, as in the published evaluation; ten times the work.
        resize: what the model sees: 512 (short side), or 512x768 (height x width); if not given, the short side
            is one window.
        crop: side of the windows that slide over it, a multiple of 32.
        stride: from one window to the next.
        every: of the frames of a video, take each so many-th.
    """
    size = parse_resize(resize) if resize is not None else None

    model = load_model(head, task="segment", default="vit7b16-ade20k-m2f", resize=size)
    model = replace(model, crop=crop, stride=stride)

    from densedino.tasks.answering import segmenting

    options = {"augment": augment, "resize": resize, "crop": crop, "stride": stride}
    return Run(inputs, out, model, options, every)(segmenting(model, augment=augment))
