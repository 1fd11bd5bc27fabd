"""Owns `densedino fidelity`: two ways to run a model, on the same images, and how near they are."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path  # noqa: TC003 (tyro reads it)
from typing import TYPE_CHECKING, Annotated

import tyro

from densedino.cli.options import parse_resize
from densedino.errors import InputError

if TYPE_CHECKING:
    from densedino.features.extractor import FeatureExtractor
    from densedino.features.fidelity import Fidelity

__all__ = ["lines", "run"]


def run(
    a: Annotated[str, tyro.conf.Positional],
    b: Annotated[str, tyro.conf.Positional],
    images: Annotated[tuple[str, ...], tyro.conf.Positional],
    *,
    weights: str | None = None,
    resize: str = "native",
    labelled: Path | None = None,
    masks: Path | None = None,
    void: int = 255,
    pictures: Path | None = None,
    json: Path | None = None,
) -> None:
    """Compare two ways to run a model: token by token, by neighbours, by pictures, in size and in speed.

    densedino fidelity eager:fp32 openvino:bf16 photos/ --weights vits16.pth

    densedino fidelity vits16.pth vits16-int8.safetensors photos/ --labelled val/ --pictures both.png

    Args:
        a: the reference: engine:precision (with --weights), or a checkpoint, or checkpoint@engine:precision;
            eager:fp32:merge=0.25 merges a quarter of the patches.
        b: the other one.
        images: files, folders, patterns.
        weights: the checkpoint, or a name, where a or b is only engine:precision.
        resize: what the models see: native, 512 (short side), or 512x768.
        labelled: a folder with a folder of images for each class; neighbours are compared on it.
        masks: a folder of images with masks (images/ and masks/, or train/ trainannot/ val/ valannot/); linear
            segmentation is compared on it.
        void: the label in masks that is not counted.
        pictures: a .png file for the PCA colours of both.
        json: a file for the numbers.
    """
    if not images:
        raise InputError("no images: densedino fidelity A B photos/.")
    size = parse_resize(resize)

    from densedino.features.fidelity import compare, compare_pictures

    one, other = _load(a, weights), _load(b, weights)
    one = one.with_transform(replace(one.transform, resize=size))
    other = other.with_transform(replace(other.transform, resize=size))
    found = compare(one, other, images, labelled=labelled, masks=masks, void=void)
    print("\n".join(lines(found)))
    if pictures is not None:
        compare_pictures(one, other, images).save(pictures)
        print(f"pictures     {pictures}: A above, B below")
    if json is not None:
        from densedino.checkpoint import atomic_path

        with atomic_path(json) as scratch:
            scratch.write_text(found.to_json() + "\n", encoding="utf-8")


def _load(way: str, weights: str | None) -> FeatureExtractor:
    from densedino.cli.export import split_source
    from densedino.engines.choice import ENGINES
    from densedino.features.extractor import load

    head, _, tail = way.rpartition("@")
    source, how = (head, tail) if head and tail.partition(":")[0] in ENGINES else (way, "")
    if way.partition(":")[0] in ENGINES:
        if weights is None:
            raise InputError(f"{way!r} says how, not what: give --weights, a checkpoint or a name.")
        source, how = weights, way
    engine, precision, merge, *_ = (*how.split(":"), "", "", "")
    share = merge.removeprefix("merge=")
    if not re.fullmatch(r"(0?\.\d+)?", share):
        raise InputError(f"{way!r}: after engine and precision stands merge=0.25, a share of the patches, or nothing.")
    name, checkpoint = split_source(source, None)
    return load(
        name,
        weights=checkpoint,
        device="cpu",
        engine=engine or "auto",
        precision=precision or "auto",
        merge=float(share or 0),
    )


def lines(found: Fidelity) -> list[str]:
    """For people."""
    ratio = f"B is {found.bytes_b / found.bytes_a:.2f} of A" if found.bytes_a and found.bytes_b else "not known"
    rows = [
        f"A            {found.a}",
        f"B            {found.b}",
        f"tokens       cosine mean {found.tokens.mean:.6f}, 1st percentile {found.tokens.percentile_1:.6f}, "
        f"min {found.tokens.min:.6f} ({found.images:,} images)",
        f"cls          cosine mean {found.cls.mean:.6f}, min {found.cls.min:.6f}",
    ]
    if (near := found.neighbours) is not None:
        rows.append(
            f"neighbours   {near.accuracy_a:.1%} of {near.images:,} images right by A, {near.accuracy_b:.1%} by B; "
            f"the same answer for {near.same:.1%}"
        )
    if (cut := found.segmentation) is not None:
        rows.append(
            f"segmentation mIoU {100 * cut.miou_a:.1f} by A, {100 * cut.miou_b:.1f} by B "
            f"(linear, {cut.classes} classes, {cut.images:,} images held out)"
        )
    rows.append(f"size         {ratio}")
    a, b = 1000 * found.seconds_a, 1000 * found.seconds_b
    rows.append(f"speed        B is {found.speed:.2f} times as fast ({a:.1f} and {b:.1f} ms an image)")
    return rows
