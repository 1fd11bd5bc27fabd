"""Owns `densedino depth`: pictures in, metres at each of their pixels out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from densedino.cli.answering import AS_PUBLISHED, ModelOptions, Run, load_model
from densedino.cli.options import parse_resize
from densedino.errors import InputError

if TYPE_CHECKING:
    from densedino.tasks.depth import DepthEstimator

__all__ = ["run"]


def run(
    inputs: Annotated[tuple[str, ...], tyro.conf.Positional],
    *,
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("depth"),
    head: Annotated[ModelOptions, tyro.conf.arg(name="")] = AS_PUBLISHED,
    flip: bool = False,
    resize: str | None = None,
    every: int = 1,
) -> int:
    """Estimate depth, or with --model vitl16-chmv2-dpt canopy height, with a released DPT head.

    A folder: densedino depth photos/ --weights dinov3_vit7b16_synthmix_dpt_head-02040be1.pth
        --backbone-weights dinov3_vit7b16_pretrain_lvd1689m-a955f4ea.pth --engine stream -o depth/

    Canopy height of a scene, as a GeoTIFF in metres: densedino depth scene.tif --model vitl16-chmv2-dpt -o heights.tif

    For each picture the folder gets NAME.depth.png (16 bits, 256 levels per metre, the picture's own size), a sheet to
    look at, and a record. The same command again goes on after an interruption.

    Args:
        inputs: files, folders, patterns, .txt lists of paths, videos.
        out: the folder for the answers; or of a scene, for the height of each of its pixels, a name that ends in .tif.
        head: which model, run how.
        flip: average with the mirrored picture's, as in the published evaluation.
        resize: what the model sees: native, 512 (short side), or 512x768 (height x width); as published if not given:
            a square of 768 pixels for depth, the picture's own size for canopy height.
        every: of the frames of a video, take each so many-th.
    """
    size = parse_resize(resize) if resize is not None else None
    model = load_model(head, task="depth", default="vit7b16-synthmix-dpt", resize=size)

    if out.suffix.lower() in (".tif", ".tiff"):
        return _scene(inputs, out, model)
    from densedino.tasks.answering import estimating

    return Run(inputs, out, model, {"flip": flip, "resize": resize}, every)(estimating(model, flip=flip))


def _scene(inputs: tuple[str, ...], out: Path, model: DepthEstimator) -> int:
    from densedino.cli.progress import progress
    from densedino.geo.heights import map_heights

    if len(inputs) != 1:
        raise InputError(f"-o {out}: one scene gives one GeoTIFF, and {len(inputs)} inputs were given.")
    with progress("windows") as (begin, advance):
        done = map_heights(model, inputs[0], output=out, begin=begin, advance=advance)
    print(f"{done.path}: {done.size[1]}x{done.size[0]} pixels, {done.metres[0]:.2f} to {done.metres[1]:.2f} m")
    return 0
