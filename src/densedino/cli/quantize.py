"""Owns `densedino quantize`: weights and images in, one file in integers out, with the report of what that costs."""

from __future__ import annotations

import sys
from pathlib import Path  # noqa: TC003 (tyro reads it)
from typing import Annotated, Literal

import tyro

__all__ = ["run"]


def run(
    source: Annotated[str, tyro.conf.Positional],
    *,
    calibrate: str,
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])],
    to: Literal["int8", "int4"] = "int8",
    weights: str | None = None,
    size: int = 224,
    images: int = 128,
    labelled: Path | None = None,
    masks: Path | None = None,
    void: int = 255,
    pictures: Path | None = None,
) -> None:
    """Write a backbone in integers for OpenVINO, and say how near it stays to the original.

    densedino quantize dinov3_vits16.pth --calibrate photos/ -o vits16-int8.safetensors

    Then: densedino extract photos/ --weights vits16-int8.safetensors

    Args:
        source: a checkpoint, or weights or an architecture by name.
        calibrate: images like those that will come: a folder, a pattern, a list. The report is on those beyond the
            ones used, or on these if there are no others.
        out: the .safetensors file.
        to: int8 (weights and activations: fastest), int4 (weights alone: smallest).
        weights: a checkpoint, where the source is a name; "random" for untrained ones.
        size: short side in pixels that images are resized to, for calibration and report.
        images: the most to calibrate on.
        labelled: a folder with a folder of images for each class, for the effect on neighbours.
        masks: a folder of images with masks (images/ and masks/, or train/ trainannot/ val/ valannot/), for the effect
            on linear segmentation.
        void: the label in masks that is not counted.
        pictures: a .png file for the PCA colours of both.
    """
    from densedino.cli.export import split_source
    from densedino.cli.fidelity import lines
    from densedino.features.fidelity import compare_pictures
    from densedino.features.quantizing import quantize

    name, checkpoint = split_source(source, weights)
    print(f"calibrating on at most {images} images, which takes minutes", file=sys.stderr, flush=True)
    done = quantize(
        name,
        weights=checkpoint,
        images=calibrate,
        output=out,
        to=to,
        size=size,
        most=images,
        labelled=labelled,
        masks=masks,
        void=void,
    )
    print(f"wrote {out}: {out.stat().st_size / 1e6:.1f} MB, {done.calibrated} images seen")
    print("\n".join(f"  {line}" for line in lines(done.fidelity)))
    if pictures is not None:
        compare_pictures(done.original, done.quantized, [calibrate]).save(pictures)
        print(f"  pictures     {pictures}: A above, B below")
