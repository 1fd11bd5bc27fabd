"""Owns `densedino segment`: a few labels in, a map of classes with its confidence out."""

from __future__ import annotations

import itertools
import math
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from densedino.cli.options import parse_resize
from densedino.cli.scene_store import scene_store
from densedino.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from densedino.adapters.few_clicks import Clicks, Head
    from densedino.features.extractor import FeatureExtractor
    from densedino.features.tokens import Features

__all__ = ["choose", "run"]

_SIDE = 1024  # by default a photograph is resized to the area of a square of this side: fine enough for a mask


def choose(args: Sequence[str]) -> Callable[..., object]:
    """What `densedino segment` runs: with --model HEAD a released head, which needs no labels; else `run`."""
    from densedino.heads.catalog import HEADS

    heads = {name for spec in HEADS.values() for name in (spec.name, spec.hub) if name}
    given = {value.removeprefix("--model=") for value in args if value.startswith("--model=")}
    given |= {after for flag, after in itertools.pairwise(args) if flag == "--model"}
    if not given & heads:
        return run
    from densedino.cli.segment_by_head import run as by_head

    return by_head


def run(
    inputs: Annotated[tuple[Path, ...], tyro.conf.Positional],
    *,
    points: Path | None = None,
    foreground: tuple[str, ...] = (),
    background: tuple[str, ...] = (),
    field: str | None = None,
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None,
    head: Literal["linear", "knn"] = "linear",
    per_patch: bool = False,
    store: Path | None = None,
    resize: str | None = None,
    model: str | None = None,
    weights: str | None = None,
    device: str = "auto",
    precision: str = "auto",
) -> int:
    """Train a small head on a few labels, in seconds, and say what everything else is.

    An object before its background: densedino segment photo.jpg --foreground 210,90 160,200 --background 20,20 430,280

    Any classes, from points or areas: densedino segment photo.jpg --points points.geojson

    A scene, as a GeoTIFF of classes and confidence: densedino segment scene.tif --points points.geojson -o map.tif

    The same head on more photographs: densedino segment a.jpg b.jpg c.jpg --points points.geojson -o masks

    Args:
        inputs: photographs, the labels are in the first; or a scene: its GeoTIFF, or its folder of features.
        points: a GeoJSON file of points and polygons with a class each, in pixels of the photograph or coordinates of
            the scene; or an image of class numbers, 0 (or its nodata value) where nothing is said.
        foreground: x,y of pixels of the object.
        background: x,y of pixels of what is not.
        field: the property in the GeoJSON that is the class; class, label, name, value or id if not given.
        out: the PNG to write, or for several photographs a folder; <photo>_mask.png here if not given. Beside it
            come <name>_confidence.png and <name>_sheet.png. Of a scene the GeoTIFF to write, class and confidence.
        head: linear (logistic regression) or knn (a vote of the nearest labelled patches).
        per_patch: of a scene: one pixel per patch, instead of the scene's own pixels.
        store: of a GeoTIFF: the folder of its features; <scene>_features here if not given. If there is none, it is
            made, in tiles of 512 pixels; for other options run densedino extract SCENE.tif --tile 512 … before.
        resize: what the model sees of a photograph: 512 (short side), 512x768 (height x width) or native; about
            1024x1024 pixels of its own shape if not given.
        model: an architecture or weights by name, see `densedino models` and `densedino weights`; or a released head,
            which needs no labels: densedino segment --model vit7b16-ade20k-m2f --help.
        weights: a checkpoint: a file, an https:// URL, a hub id.
        device: auto, cpu, cuda, mps.
        precision: auto, fp32, bf16.
    """
    if not inputs:
        raise InputError("no input: densedino segment photo.jpg --foreground 210,90 --background 20,20")
    if inputs[0].is_dir() or inputs[0].suffix.lower() in (".tif", ".tiff"):
        flags = _SceneFlags(store, points, field, out, head, per_patch)
        return _segment_scene(inputs, flags, model=model, weights=weights, device=device, precision=precision)
    targets = _targets(inputs, out)
    size = parse_resize(resize) if resize is not None else None
    labels = _labels(points, foreground, background, field)

    from densedino.adapters.photo_masks import photo_head
    from densedino.features.extractor import load

    dino = load(model, weights=weights, device=device, precision=precision, resize=size)
    features = _features(dino, inputs[0], by_area=resize is None)
    start = time.perf_counter()
    fitted, classes, count = photo_head(features, labels, head=head)
    seconds = time.perf_counter() - start
    _note(f"head       {head}, {len(classes)} classes ({', '.join(classes)}) from {count} patches in {seconds:.2f} s")
    for i, (path, target) in enumerate(zip(inputs, targets, strict=True)):
        features = features if i == 0 else _features(dino, path, by_area=resize is None)
        _write(features, fitted, classes, path, target, labels if i == 0 else None, dino)
    return 0


@dataclass(frozen=True)
class _SceneFlags:
    store: Path | None
    points: Path | None
    field: str | None
    out: Path | None
    head: Head
    per_patch: bool


def _segment_scene(
    inputs: tuple[Path, ...],
    flags: _SceneFlags,
    *,
    model: str | None,
    weights: str | None,
    device: str,
    precision: str,
) -> int:
    from densedino.cli.progress import progress
    from densedino.geo.segmenting import segment_scene

    scene, out = inputs[0], flags.out or Path(f"{inputs[0].stem}_map.tif")
    if len(inputs) > 1:
        raise InputError(f"{len(inputs)} scenes given; segment one at a time.")
    if flags.points is None:
        raise InputError("a scene needs --points FILE: GeoJSON, or a raster of class numbers.")
    opened = scene_store(scene, folder=flags.store, model=model, weights=weights, device=device, precision=precision)

    def fitted(classes: tuple[str, ...], patches: int, seconds: float) -> None:
        names = ", ".join(classes)
        _note(f"head       {flags.head}, {len(classes)} classes ({names}) from {patches:,} patches in {seconds:.2f} s")

    with progress("rows of patches") as (begin, advance):
        begin(opened.grid[0])
        result = segment_scene(
            opened,
            flags.points,
            output=out,
            head=flags.head,
            field=flags.field,
            per_patch=flags.per_patch,
            fitted=fitted,
            advance=advance,
        )
    shares = ", ".join(f"{name} {share:.0%}" for name, share in zip(result.classes, result.shares, strict=True))
    print(f"{out}: {shares}; mean confidence {result.confidence:.2f}")
    return 0


def _targets(inputs: tuple[Path, ...], out: Path | None) -> list[Path]:
    """The PNG of each photograph."""
    names = [f"{path.stem}_mask.png" for path in inputs]
    if len(inputs) == 1 and out is not None and not out.is_dir():
        if out.suffix.lower() != ".png":
            raise InputError(f"-o {out}: masks are written as PNG; give a name that ends in .png, or a folder.")
        targets = [out]
    else:
        targets = [(out or Path()) / name for name in names]
    if len(set(targets)) < len(targets):
        raise InputError("two of the photographs have the same name, so their masks would too. Rename one.")
    return targets


def _labels(
    points: Path | None, foreground: tuple[str, ...], background: tuple[str, ...], field: str | None
) -> Clicks | NDArray[np.int64]:
    import numpy as np

    from densedino.adapters.few_clicks import Clicks, read_points
    from densedino.features.queries import parse_region
    from densedino.images.labelled import read_mask

    if (points is None) == (not foreground and not background):
        raise InputError("give labels: --points FILE, or --foreground x,y … --background x,y …; one of the two ways.")
    if points is None:
        named = [("foreground", text) for text in foreground] + [("background", text) for text in background]
        return Clicks(tuple((name, np.array([parse_region(text)[:2]])) for name, text in named))
    if points.suffix.lower() in (".geojson", ".json"):
        return read_points(points, field=field)
    return read_mask(points).numpy()


def _features(dino: FeatureExtractor, path: Path, *, by_area: bool) -> Features:
    from densedino.images.decoding import read_image

    transform = dino.transform
    pixels = read_image(path, in_chans=transform.in_chans)
    if by_area:
        height, width = pixels.array.shape[:2]
        factor = _SIDE / math.sqrt(height * width) / transform.stride
        rows, cols = (max(1, round(side * factor)) * transform.stride for side in (height, width))
        transform = replace(transform, resize=(rows, cols))
    return dino.run([transform(pixels)])


def _write(
    features: Features,
    head: Callable[[Tensor], Tensor],
    classes: tuple[str, ...],
    path: Path,
    target: Path,
    labels: Clicks | NDArray[np.int64] | None,
    dino: FeatureExtractor,
) -> None:
    from densedino import __version__
    from densedino.adapters.few_clicks import Clicks
    from densedino.adapters.photo_masks import photo_mask, write_photo_mask
    from densedino.features.findings import read_photo

    mask = photo_mask(features, head, classes)
    photo = read_photo(str(path))
    if photo is None:
        raise InputError(f"{str(path)!r} was there a moment ago, and is gone.")
    clicks = labels if isinstance(labels, Clicks) else None
    heading = f"densedino {__version__} · {path.name} · {dino.card.name} ({dino.card.sha256[:8]})"
    write_photo_mask(mask, target, photo=photo, clicks=clicks, heading=heading)
    shares = ", ".join(f"{name} {(mask.labels == number).mean():.0%}" for number, name in enumerate(classes))
    print(f"{target}: {shares}; mean confidence {mask.confidence.mean() / 255:.2f}")


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
