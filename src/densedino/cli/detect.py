"""Owns `densedino detect`: pictures in, boxes of objects out."""

from __future__ import annotations

from functools import partial
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
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("objects"),
    head: Annotated[ModelOptions, tyro.conf.arg(name="")] = AS_PUBLISHED,
    threshold: float = 0.5,
    resize: str | None = None,
    every: int = 1,
) -> int:
    """Find objects of COCO's categories, with a released DETR head.

    A folder: densedino detect photos/ --weights dinov3_vit7b16_coco2017_detr_head-b0235ff7.pth
        --backbone-weights dinov3_vit7b16_pretrain_lvd1689m-a955f4ea.pth --engine stream -o objects/

    The folder gets a sheet and a record per picture, and coco.json. The same command again goes on after an
    interruption.

    Args:
        inputs: files, folders, patterns, .txt lists of paths, videos.
        out: the folder for the answers.
        head: which model, run how.
        threshold: leave out what is less sure, 0 to 1.
        resize: what the model sees: 800 (short side), or 800x1200 (height x width); the picture's own size if not
            given, within limits.
        every: of the frames of a video, take each so many-th.
    """
    size = parse_resize(resize) if resize is not None else None
    if not 0 <= threshold <= 1:
        raise InputError(f"--threshold {threshold}: scores are between 0 and 1.")
    model = load_model(head, task="detect", default="vit7b16-coco2017-detr", resize=size)

    from densedino.tasks.answering import coco_json, detecting

    go = Run(inputs, out, model, {"threshold": threshold, "resize": resize}, every)
    return go(detecting(model, threshold=threshold), table=("coco.json", partial(coco_json, names=model.names)))
