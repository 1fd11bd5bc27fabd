"""Owns `densedino view`: from image files to one PNG of pictures of their features."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from densedino.cli.options import parse_resize
from densedino.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

    from densedino.features.extractor import FeatureExtractor
    from densedino.features.pictures import Picture
    from densedino.features.tokens import Features
    from densedino.images.decoding import Pixels
    from densedino.images.transforms import Prepared

__all__ = ["run"]

What = Literal["pca", "foreground", "similarity", "attention"]

_SIDE = 768  # by default an image is resized to the area of a square of this side: a fine grid, seconds on a laptop
_MOST_IMAGES = 64
_SHEET_PIXELS = 48_000_000  # panels shrink until the whole sheet is about that large


def run(
    images: Annotated[tuple[Path, ...], tyro.conf.Positional],
    *,
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None,
    what: tuple[What, ...] = (),
    point: str | None = None,
    patch: str | None = None,
    joint: bool = False,
    background: Literal["black", "keep"] = "black",
    layer: int | None = None,
    head: int | None = None,
    resize: str | None = None,
    max_value: int | None = None,
    nearest: bool = False,
    model: str | None = None,
    weights: str | None = None,
    device: str = "auto",
    precision: str = "auto",
    panel: int = 768,
    show: bool = False,
) -> int:
    """Draw pictures of the features of images, beside the photographs, as one PNG.

    Colours of principal components, beside the photo: densedino view photo.jpg

    Equal colours for equal features in several images: densedino view a.jpg b.jpg --joint

    What is similar to a spot: densedino view photo.jpg --point 240,130

    Where CLS looks: densedino view photo.jpg --what attention --head 2 --layer 8

    Args:
        images: image files; one row of pictures each.
        out: the PNG to write; <name of the first image>_<what>.png in the current folder if not given.
        what: pca (three principal components of all patches as colours), foreground (the same of the object alone,
            found by the first component), similarity (to --point or --patch), attention (of CLS). Not given: pca and
            foreground; or similarity, if a point or patch is given.
        point: x,y of a pixel of the first image, as decoded: similarity to the patch that shows it.
        patch: row,col of a patch of the first image instead of a point.
        joint: one PCA basis for all images, so that equal colours mean equal features.
        background: of the foreground picture: black, or keep the colours that the object's components give it.
        layer: the block whose tokens or attention are drawn, 0 the first, -1 the last; final tokens if not given.
        head: the attention head, 0 the first; the mean of all if not given.
        resize: what the model sees: 512 (short side), 512x768 (height x width) or native; about 768x768 pixels of the
            image's own shape if not given. Finer grids cost time.
        max_value: white in 16-bit files, such as 4095 for 12-bit data; 65535 if not given.
        nearest: one flat square per patch instead of smooth colours.
        model: an architecture or weights by name, see `densedino models` and `densedino weights`.
        weights: a checkpoint: a file, an https:// URL, a hub id.
        device: auto, cpu, cuda, mps.
        precision: auto, fp32, bf16.
        panel: longer side of each picture, in pixels.
        show: open the PNG in the system's viewer.
    """
    wanted = _wanted(what, asked=point is not None or patch is not None)
    target = _target(images, out, wanted)
    spot = _pair(point, "--point", "x,y") if point is not None else None
    cell = _pair(patch, "--patch", "row,col") if patch is not None else None
    if spot and cell:
        raise InputError("--point and --patch both say where to look; give one of them.")
    size = parse_resize(resize) if resize is not None else None
    if panel < 16:
        raise InputError(f"--panel {panel} is too small to see anything; give 16 or more, such as 768.")

    from densedino.features.extractor import load

    dino = load(model, weights=weights, device=device, precision=precision, resize=size)
    dino = dino.with_transform(replace(dino.transform, max_value=max_value))
    long_side = min(panel, int(math.sqrt(_SHEET_PIXELS / (len(images) * (1 + len(wanted))))))
    views = [_view(path, dino, layer, long_side, by_area=resize is None) for path in images]
    options = _Options(cell, spot, joint, background, layer, head, long_side, smooth=not nearest)
    columns = [_pictures(kind, dino, views, options) for kind in wanted]
    _write(target, dino, views, columns, layer=layer, show=show)
    return 0


@dataclass(frozen=True)
class _View:
    path: Path
    photo: Image.Image
    prepared: Prepared
    features: Features


@dataclass(frozen=True)
class _Options:
    patch: tuple[int, int] | None
    point: tuple[int, int] | None
    joint: bool
    background: Literal["black", "keep"]
    layer: int | None
    head: int | None
    long_side: int
    smooth: bool


def _wanted(what: tuple[What, ...], *, asked: bool) -> tuple[What, ...]:
    wanted = tuple(dict.fromkeys(what)) or (("similarity",) if asked else ("pca", "foreground"))
    if "similarity" in wanted and not asked:
        raise InputError("similarity to what? Give --point x,y (a pixel of the first image) or --patch row,col.")
    if asked and "similarity" not in wanted:
        raise InputError(
            f"--point and --patch are for similarity, but --what is {' '.join(wanted)}. Add similarity to it."
        )
    return wanted


def _target(images: tuple[Path, ...], out: Path | None, wanted: tuple[What, ...]) -> Path:
    if not 1 <= len(images) <= _MOST_IMAGES:
        raise InputError(f"{len(images)} images given; one sheet shows 1 to {_MOST_IMAGES}.")
    name = f"{images[0].stem}_{wanted[0]}.png"
    target = Path(name) if out is None else out / name if out.is_dir() else out
    if target.suffix.lower() != ".png":
        raise InputError(f"-o {target}: pictures are written as PNG; give a name that ends in .png, or a folder.")
    if any(target.exists() and image.exists() and target.samefile(image) for image in images):
        raise InputError(f"-o {target} is one of the images; it would be overwritten. Give another name.")
    return target


def _pair(text: str, flag: str, form: str) -> tuple[int, int]:
    match = re.fullmatch(r"\s*(-?\d+)\s*[,; ]\s*(-?\d+)\s*", text)
    if not match:
        raise InputError(f"{flag} {text!r} is not two whole numbers; write {flag} {form}, such as {flag} 240,130.")
    return int(match[1]), int(match[2])


def _view(path: Path, dino: FeatureExtractor, layer: int | None, long_side: int, *, by_area: bool) -> _View:
    from PIL import Image

    from densedino.features.pictures import picture_size
    from densedino.images.decoding import read_image

    transform = dino.transform
    pixels = read_image(path, in_chans=transform.in_chans, max_value=transform.max_value)
    height, width = pixels.array.shape[:2]
    if by_area:
        factor = _SIDE / math.sqrt(height * width) / transform.stride
        rows, cols = (max(1, round(side * factor)) * transform.stride for side in (height, width))
        transform = replace(transform, resize=(rows, cols))
    prepared = transform(pixels)
    features = dino.run([prepared], layers=() if layer is None else (layer,))
    drawn = picture_size((height, width), long_side)
    photo = _photo(pixels).resize((drawn[1], drawn[0]), Image.Resampling.LANCZOS)
    return _View(path, photo, prepared, features)


def _photo(pixels: Pixels) -> Image.Image:
    """Show the first three channels, or the only one."""
    import numpy as np
    from PIL import Image

    array = pixels.array[..., :3] if pixels.array.shape[2] >= 3 else pixels.array[..., :1].repeat(3, axis=2)
    if array.dtype != np.uint8:
        array = (array.astype(np.float32) * (255 / pixels.max_value)).clip(0, 255).round().astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(array))


def _pictures(kind: What, dino: FeatureExtractor, views: list[_View], o: _Options) -> list[Picture]:
    from densedino.features import pictures

    features = [view.features for view in views]
    if kind == "attention":
        layer = -1 if o.layer is None else o.layer
        maps = [pictures.cls_attention(dino, view.prepared, layer=layer) for view in views]
        return pictures.attention_images(features, maps, head=o.head, long_side=o.long_side, smooth=o.smooth)
    if kind == "similarity":
        patch = o.patch or pictures.patch_at(features[0], o.point or (0, 0), layer=o.layer)
        return pictures.similarity_images(features, patch=patch, layer=o.layer, long_side=o.long_side, smooth=o.smooth)
    return pictures.pca_images(
        features,
        foreground=kind == "foreground",
        joint=o.joint,
        background=o.background,
        layer=o.layer,
        long_side=o.long_side,
        smooth=o.smooth,
    )


def _write(
    target: Path,
    dino: FeatureExtractor,
    views: list[_View],
    columns: list[list[Picture]],
    *,
    layer: int | None,
    show: bool,
) -> None:
    from densedino import __version__
    from densedino.features.sheet import Row, draw_sheet, save_png

    card = dino.card
    rows = []
    for i, view in enumerate(views):
        (height, width), (h, w) = view.prepared.source_size, view.features.grid
        seen_h, seen_w = view.prepared.input_size
        caption = (view.path.name, f"{width}x{height} pixels, seen at {seen_w}x{seen_h}: {w}x{h} patches")
        rows.append(Row(photo=view.photo, caption=caption, pictures=[column[i] for column in columns]))
    tokens = "final tokens" if layer is None else f"layer {layer}"
    heading = f"densedino {__version__} · {card.model} · weights {card.name} ({card.sha256[:8]}) · {tokens}"
    alarm = (
        "UNTRAINED (random weights): these pictures show the architecture, not learned features"
        if card.untrained
        else ""
    )
    sheet = draw_sheet(rows, heading=heading, alarm=alarm)
    facts = {
        "Software": f"densedino {__version__}",
        "Model": card.model,
        "Weights": f"{card.name} {card.sha256}",
        "Untrained": "yes" if card.untrained else "no",
        "Licence": card.licence,
        "Comment": f"{tokens}; " + "; ".join(": ".join(row.caption) for row in rows),
    }
    save_png(sheet, target, facts=facts)
    state = "UNTRAINED, random weights" if card.untrained else card.licence
    print(f"{target}: {sheet.width}x{sheet.height} pixels, {card.name} ({state})")
    if show:
        sheet.show(title=str(target))
