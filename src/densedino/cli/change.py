"""Owns `densedino change`: two pictures of one place in, a map of what changed out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from densedino.cli.options import parse_resize
from densedino.cli.scene_store import scene_store
from densedino.errors import InputError

if TYPE_CHECKING:
    from densedino.features.extractor import FeatureExtractor

__all__ = ["run"]

_RASTERS = (".tif", ".tiff", ".jp2", ".vrt")


def run(
    before: Annotated[Path, tyro.conf.Positional],
    after: Annotated[Path, tyro.conf.Positional],
    *,
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None,
    per_patch: bool = False,
    resize: str = "768",
    model: str | None = None,
    weights: str | None = None,
    device: str = "auto",
    precision: str = "auto",
) -> int:
    """Say what changed between two pictures of one place: scenes on one grid, or photographs from one point.

    A GeoTIFF of values from 0 (as before) to 2: densedino change 2019.tif 2024.tif -o change.tif

    Two photographs, as a picture: densedino change before.jpg after.jpg -o change.png

    Features are compared patch by patch, after what is common to each date was taken out; so light and season count
    less than new things do. Of scenes, the features are kept in <scene>_features and used again.

    Args:
        before: a photograph, a GeoTIFF, or the folder of features of a scene.
        after: the same place, later.
        out: .tif for scenes, .png for photographs; change.tif or change.png if not given.
        per_patch: of scenes: one pixel per patch, instead of the scene's own pixels.
        resize: what the model sees of photographs: 768 (short side), 512x768 (height x width) or native.
        model: an architecture or weights by name, see `densedino models` and `densedino weights`.
        weights: a checkpoint: a file, an https:// URL, a hub id.
        device: auto, cpu, cuda, mps.
        precision: auto, fp32, bf16.
    """
    scenes = [path.is_dir() or path.suffix.lower() in _RASTERS for path in (before, after)]
    if scenes[0] != scenes[1]:
        raise InputError(f"{before} and {after}: give two scenes, or two photographs.")
    target = out or Path("change.tif" if scenes[0] else "change.png")
    choice = _Choice(model, weights, device, precision)
    if scenes[0]:
        return _scenes(before, after, target, choice, per_patch=per_patch)
    if target.suffix.lower() != ".png":
        raise InputError(f"-o {target}: the change of photographs is written as PNG; give a name that ends in .png.")
    return _photos(before, after, target, choice, resize)


@dataclass(frozen=True)
class _Choice:
    model: str | None
    weights: str | None
    device: str
    precision: str

    def load(self, resize: str) -> FeatureExtractor:
        from densedino.features.extractor import load

        return load(
            self.model,
            weights=self.weights,
            device=self.device,
            precision=self.precision,
            resize=parse_resize(resize),
        )


def _scenes(before: Path, after: Path, target: Path, choice: _Choice, *, per_patch: bool) -> int:
    from densedino.cli.progress import progress
    from densedino.geo.changes import change_scenes

    stores = [
        scene_store(
            path,
            folder=None,
            model=choice.model,
            weights=choice.weights,
            device=choice.device,
            precision=choice.precision,
        )
        for path in (before, after)
    ]
    with progress("rows of patches") as (begin, advance):
        begin(stores[0].grid[0])
        result = change_scenes(stores[0], stores[1], output=target, per_patch=per_patch, advance=advance)
    print(
        f"{target}: {result.changed:.1%} of {result.patches:,} patches changed more than {result.threshold:.2f}, the "
        "value that parts little from much (Otsu)"
    )
    return 0


def _photos(before: Path, after: Path, target: Path, choice: _Choice, resize: str) -> int:
    from PIL import Image

    from densedino import __version__
    from densedino.features.change import change_picture, photo_change
    from densedino.features.findings import read_photo
    from densedino.features.pictures import Picture
    from densedino.features.sheet import Row, draw_sheet, save_png

    dino = choice.load(resize)
    old, new = dino(before), dino(after)
    change, threshold = photo_change(old, new)
    picture = change_picture(change, new, long_side=512)
    photos = [read_photo(str(path)) for path in (before, after)]
    small = [photo.resize(picture.image.size, Image.Resampling.LANCZOS) for photo in photos if photo]
    row = Row(photo=small[0], caption=(before.name, ""), pictures=[Picture(image=small[1], title=after.name), picture])
    heading = f"densedino {__version__} · change · {dino.card.name} ({dino.card.sha256[:8]})"
    alarm = "UNTRAINED (random weights)" if dino.card.untrained else ""
    known = change[change.isfinite()]
    changed = float((known > threshold).float().mean())
    sheet = draw_sheet([row], heading=heading, alarm=alarm)
    save_png(sheet, target, facts={"Comment": f"threshold {threshold:.3f}"})
    print(f"{target}: {changed:.1%} of {len(known):,} patches changed more than {threshold:.2f} (Otsu)")
    return 0
