"""Owns `densedino extract`: options, what is said before, during and after, and the exit status."""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from densedino.cli.options import parse_resize
from densedino.cli.progress import progress
from densedino.cli.scene import SceneFlags, is_scene, run_scene
from densedino.cli.spread import SpreadFlags
from densedino.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable

    from densedino.features.extract import Report
    from densedino.features.extractor import FeatureExtractor
    from densedino.features.planning import Plan
    from densedino.features.spread import RayRunner

__all__ = ["run"]

_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class ImageFlags:
    """Of images and videos."""

    resize: str = "native"
    """what the model sees: native, 512 (short side), or 512x768 (height x width)"""
    fit: Literal["pad", "crop", "resize", "error"] = "pad"
    """sizes that are no multiple of the patch size: pad, crop, resize, or error"""
    max_tokens: int = 16384
    """images of more patches are made smaller; 0 for no limit"""
    max_value: int | None = None
    """white in 16-bit files, such as 4095 for 12-bit data; 65535 if not given"""
    layers: tuple[int, ...] = ()
    """blocks whose tokens are kept too, besides the final ones; 0 is the first, -1 the last"""
    batch_size: str = "auto"
    """images of one size that are run at once, or auto"""
    every: int = 1
    """of the frames of a video, take each so many-th"""
    limit: int | None = None
    """take the first so many inputs only"""
    format: Literal["lance", "npz", "safetensors"] = "lance"
    """lance (one store), npz or safetensors (one file per image)"""
    retry: bool = False
    """try the files in quarantine again"""

    def given(self) -> list[str]:
        """Options that are not as by default, as they are written."""
        changed = [field.name for field in fields(self) if getattr(self, field.name) != field.default]
        return [f"--{name.replace('_', '-')}" for name in changed]


def run(
    inputs: Annotated[tuple[str, ...], tyro.conf.Positional],
    *,
    out: Annotated[str, tyro.conf.arg(aliases=["-o"])] = "features",
    model: str | None = None,
    weights: str | None = None,
    device: str = "auto",
    engine: Literal["auto", "eager", "compile", "openvino", "onnx", "stream"] = "auto",
    precision: Literal["auto", "fp32", "bf16", "int8", "int4"] = "auto",
    memory: str | None = None,
    merge: float = 0.0,
    images: Annotated[ImageFlags, tyro.conf.arg(name="")] = ImageFlags(),
    spread: Annotated[SpreadFlags, tyro.conf.arg(name="")] = SpreadFlags(),  # noqa: B008 (frozen)
    scene: Annotated[SceneFlags, tyro.conf.arg(name="")] = SceneFlags(),  # noqa: B008 (frozen)
) -> int:
    """Compute dense features of images, and keep them on disk.

    A folder, a pattern and a video, into ./f: densedino extract photos/ "more/**/*.jpg" clip.mp4 -o f

    A list of paths, with your weights: densedino extract list.txt --weights dinov3_vits16.pth --resize 512

    A raster of any size, with its coordinates: densedino extract scene.tif --tile 512 --overlap 128 -o out.zarr

    Run the same command again to go on after an interruption, or to add new images: what stands is not computed again,
    and what has changed is. Files that cannot be used are listed in quarantine.jsonl in the output folder.

    Args:
        inputs: files, folders, patterns, .txt lists of paths, videos.
        out: the folder for the features.
        model: an architecture or weights by name, see `densedino models` and `densedino weights`.
        weights: a checkpoint: a file, an https:// URL, a hub id.
        device: auto, cpu, cuda, mps.
        engine: what runs the model: auto (the fastest that is installed), eager, compile, openvino, onnx, stream.
        precision: auto (bf16 on a GPU that has it), fp32, bf16, int8, int4.
        memory: with --engine stream, what may be used of RAM at the peak: 3GB.
        merge: share of the patches that are merged with one like them while they are run, up to 0.75; 0 for none.
        images: of images and videos.
        spread: of several processes or machines.
        scene: of one large raster.
    """
    if not inputs:
        raise InputError("no inputs: densedino extract photos/ -o features/ (files, folders, patterns, lists, videos).")
    (
        parse_resize(images.resize),
        _batch_size(images.batch_size),
        _most_tokens(images.max_tokens),
    )  # before torch is there
    from densedino.features.extractor import load

    start = partial(
        load, model, weights=weights, device=device, engine=engine, precision=precision, memory=memory, merge=merge
    )
    if is_scene(scene, out):
        return run_scene(start, inputs, out=out, flags=scene, ray=spread.ray(), refused=images.given())
    return _run_images(start, inputs, out=out, flags=images, ray=spread.ray())


def _run_images(
    start: Callable[..., FeatureExtractor],
    inputs: tuple[str, ...],
    *,
    out: str,
    flags: ImageFlags,
    ray: RayRunner | None,
) -> int:
    from densedino.features.extract import extract
    from densedino.features.work import RayExtraction

    dino = start(resize=parse_resize(flags.resize), fit=flags.fit)
    most = _most_tokens(flags.max_tokens)
    dino = dino.with_transform(replace(dino.transform, max_tokens=most, max_value=flags.max_value))
    with progress("images") as (begin, advance):

        def announce(plan: Plan) -> None:
            _say_plan(plan, dino)
            if plan.jobs:
                begin(0 if plan.videos else len(plan.jobs))

        report = extract(
            dino,
            inputs,
            output=out,
            files=flags.format,
            layers=flags.layers,
            batch_size=_batch_size(flags.batch_size),
            every=flags.every,
            limit=flags.limit,
            retry=flags.retry,
            runner=None if ray is None else RayExtraction(ray, start),
            announce=announce,
            advance=advance,
        )
    _say_report(report, flags.format)
    return 0 if report.total else 1


def _batch_size(text: str) -> int | None:
    if text == "auto":
        return None
    if text.isascii() and text.isdigit() and int(text):
        return int(text)
    raise InputError(f"--batch-size {text!r}: give a number of images, or auto.")


def _most_tokens(number: int) -> int | None:
    if number < 0:
        raise InputError(f"--max-tokens {number}: give the most patches an image may have, or 0 for no limit.")
    return number or None


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _size(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:,.0f} {unit}" if count >= 10 or unit == "bytes" else f"{count:.1f} {unit}"


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _say_plan(plan: Plan, dino: FeatureExtractor) -> None:
    card, transform, survey = dino.card, dino.transform, plan.survey
    if card.untrained:
        _note(f"weights    {card.name}, UNTRAINED: random numbers, so are the features. Real ones: --model, --weights")
    else:
        _note(f"weights    {card.name} ({card.licence}; sha256 {card.sha256[:12]})")
    size = "native size" if transform.resize is None else f"resized to {transform.resize}"
    most = f", at most {transform.max_tokens:,} patches" if transform.max_tokens else ""
    _note(f"model      {card.model} on {dino.device}, {dino.precision}; {size}, fit by {transform.fit}{most}")
    _note(f"engine     {dino.engine.name}: {dino.engine_reason}")
    parts = [f"to do      {len(plan.jobs):,} of {_count(plan.inputs, 'input')}"]
    parts += [f"{_count(plan.videos, 'video')} among them"] if plan.videos else []
    parts += [f"{plan.done:,} done before"] if plan.done else []
    parts += [f"{plan.held:,} in quarantine (--retry tries again)"] if plan.held else []
    parts += [f"{len(plan.stale):,} rows of files that changed since"] if plan.stale else []
    parts += [f"{plan.ignored:,} other files passed over"] if plan.ignored else []
    _note("; ".join(parts))
    if plan.jobs:
        about = "" if survey.exact else "about "
        beside = " (videos not counted)" if plan.videos else ""
        _note(f"takes      {about}{survey.tokens:,} patches, {_size(plan.disk_bytes)} on disk{beside}")
        _note(f"memory     at most about {_size(plan.memory_bytes)}, besides PyTorch itself")


def _say_report(report: Report, files: str) -> None:
    for entry in report.quarantined[:_SHOWN]:
        _note(f"quarantined {entry.key}: {entry.reason}")
    if len(report.quarantined) > _SHOWN:
        _note(f"            … and {len(report.quarantined) - _SHOWN:,} more")
    if report.shrunk:
        _note(f"made smaller, as they had more patches than --max-tokens: {_count(report.shrunk, 'image')}")
    rate = f", {report.rows / report.seconds:,.1f} images/s" if report.rows else ""
    skipped = f", {report.plan.done:,} done before" if report.plan.done else ""
    bad = len(report.quarantined) + report.plan.held
    quarantined = f", {bad:,} in quarantine ({report.output / 'quarantine.jsonl'})" if bad else ""
    print(
        f"{report.output}: {_count(report.rows, 'image')} done in {report.seconds:.1f} s{rate}{skipped}{quarantined}."
    )
    if not report.total:
        print("No input could be used: there are no features.")
    elif files == "lance":
        print(f"{report.total:,} rows. Open: import densedino as dd; store = dd.FeatureStore({str(report.output)!r})")
    else:
        print(f"{report.total:,} {files} files.")
