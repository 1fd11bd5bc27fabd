"""Owns `densedino prune`: weights and images in, one smaller model out, with the report of what that costs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

__all__ = ["run"]


def run(
    source: Annotated[str, tyro.conf.Positional],
    *,
    calibrate: str,
    keep: float = 0.7,
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None,
    minutes: float = 10.0,
    weights: str | None = None,
    size: int = 224,
    images: int = 128,
    labelled: Path | None = None,
    masks: Path | None = None,
    void: int = 255,
    pictures: Path | None = None,
    device: str = "auto",
) -> int:
    """Make a ViT smaller: fewer heads, hidden neurons and blocks, then some minutes of learning from the original.

    densedino prune dinov3_vits16.pth --keep 0.7 --calibrate photos/ -o vits16-small.safetensors

    Then: densedino extract photos/ --weights vits16-small.safetensors

    Run the same command again to go on after an interruption.

    Args:
        source: a checkpoint, or weights or an architecture by name.
        calibrate: images like those that will come: a folder, a pattern, a list. The report is on some kept apart.
        keep: the share of multiplications that is left.
        out: the .safetensors file; if not given, named after the source, here.
        minutes: of learning; 0 for none.
        weights: a checkpoint, where the source is a name; "random" for untrained ones.
        size: short side in pixels that images are resized to.
        images: the most to measure on; learning takes more.
        labelled: a folder with a folder of images for each class, for the effect on neighbours.
        masks: a folder of images with masks (images/ and masks/, or train/ trainannot/ val/ valannot/), for the effect
            on linear segmentation.
        void: the label in masks that is not counted.
        pictures: a .png file for the PCA colours of both.
        device: where it learns: auto, cpu, cuda, mps.
    """
    from densedino.cli.distill import Lines, note
    from densedino.cli.export import split_source
    from densedino.cli.fidelity import lines
    from densedino.features.fidelity import compare_pictures
    from densedino.pretrain.prune_run import prune

    name, checkpoint = split_source(source, weights)
    stem = (source.rstrip("/").rpartition("/")[2] if checkpoint == source else source).removesuffix(".safetensors")
    target = out or Path(f"{stem.removesuffix('.pth')}-pruned.safetensors")
    done = prune(
        name,
        weights=checkpoint,
        images=calibrate,
        output=target,
        keep=keep,
        minutes=minutes,
        size=size,
        most=images,
        labelled=labelled,
        masks=masks,
        void=void,
        device=device,
        say=note,
        advance=Lines(),
    )
    if done is None:
        print(f"stopped: run the same command again to go on ({target.with_suffix('.recovery')}).")
        return 130
    size_mb, blocks = target.stat().st_size / 1e6, done.pruned.model.depth
    print(f"wrote {target}: {size_mb:.1f} MB, {blocks} blocks, {done.steps:,} steps learnt")
    print(f"  products     {done.multiplications:.2f} of the original's multiplications at {size} pixels")
    print("\n".join(f"  {line}" for line in lines(done.fidelity)))
    if pictures is not None:
        compare_pictures(done.original, done.pruned, [calibrate]).save(pictures)
        print(f"  pictures     {pictures}: A above, B below")
    return 0
