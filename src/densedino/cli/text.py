"""Owns `densedino text`: pictures and names in, which of the names they are, as wholes and at each pixel, out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro

from densedino.cli.answering import AS_PUBLISHED, ModelOptions, Run, load_model
from densedino.errors import InputError

__all__ = ["run"]


def run(
    inputs: Annotated[tuple[str, ...], tyro.conf.Positional],
    *,
    labels: str,
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("texts"),
    head: Annotated[ModelOptions, tyro.conf.arg(name="")] = AS_PUBLISHED,
    prompts: Literal["imagenet", "plain"] = "imagenet",
    maps: Literal["yes", "no"] = "yes",
    every: int = 1,
) -> int:
    """Classify and segment pictures by names of your own, with dino.txt; nothing is trained.

    A folder: densedino text photos/ --labels "roof, tree, solar panel"
        --weights dinov3_vitl16_dinotxt_vision_head_and_text_encoder-a442d8f5.pth
        --backbone-weights dinov3_vitl16_pretrain_lvd1689m-8aa4cbdd.pth -o texts/

    For each picture the folder gets NAME.classes.png (the number of the label of each pixel, 0 the first), a sheet to
    look at and a record, and classes.csv for all. The same command again goes on after an interruption.

    Args:
        inputs: files, folders, patterns, .txt lists of paths, videos.
        labels: names, with commas between them.
        out: the folder for the answers.
        head: which model, run how.
        prompts: imagenet (the mean of CLIP's 80 sentences per label), or plain (the label itself).
        maps: whether the label of each pixel is told too.
        every: of the frames of a video, take each so many-th.
    """
    names = [name.strip() for name in labels.split(",") if name.strip()]
    if not names or len(set(names)) < len(names):
        raise InputError(f'--labels {labels!r}: give different names with commas between, such as "roof, tree".')
    model = load_model(head, task="text", default="vitl16-dinotxt")

    from densedino.tasks.answering import classes_csv, reading

    go = Run(inputs, out, model, {"labels": names, "prompts": prompts, "maps": maps}, every)
    answerer = reading(model, names, prompts=prompts, maps=maps == "yes")
    return go(answerer, table=("classes.csv", classes_csv))
