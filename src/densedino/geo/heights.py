"""Owns canopy height of scenes: a raster in, metres on the same grid out as GeoTIFF, window by window.

Each window is larger than the part of it that is kept: what lies around that part is what the head sees beside it.
Windows that are done stand in a folder beside the result until all are, so that an interrupted run goes on.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from densedino.checkpoint import atomic_path
from densedino.errors import InputError
from densedino.geo.raster import Scene, gdal, rasterio
from densedino.images.decoding import Pixels
from densedino.tasks.sliding import window_bounds

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from densedino.tasks.depth import DepthEstimator

__all__ = ["SceneHeights", "map_heights"]

_NODATA = -9999.0
_WINDOW, _AROUND = 1024, 128


@dataclass(frozen=True)
class SceneHeights:
    """What was written."""

    path: Path
    size: tuple[int, int]
    metres: tuple[float, float]
    """Least and most; NaN for a scene without a valid pixel."""


def map_heights(
    model: DepthEstimator,
    source: str | os.PathLike[str],
    *,
    output: str | os.PathLike[str],
    begin: Callable[[int], None] = lambda total: None,
    advance: Callable[[int], None] = lambda count: None,
) -> SceneHeights:
    """Metres at each pixel of a scene of 8-bit RGB, as a GeoTIFF (COG, float32, nodata -9999).

    Args:
        model: of `dd.load("vitl16-chmv2-dpt", …)`.
        source: a raster whose first three bands are red, green and blue in 8 bits.
        output: ends in .tif.
        begin: is told how many windows there are.
        advance: is told how many more are done.

    Raises:
        InputError: another kind of raster, or of name.
        ImageError: a file that cannot be read as a raster.
        MissingExtraError: rasterio is not installed.
    """
    target = Path(output)
    if not model.is_height:
        raise InputError(
            f"{model.headed.spec.name} tells how far things are from a camera, not how high a scene is. Use the head "
            "'vitl16-chmv2-dpt'."
        )
    if target.suffix.lower() not in (".tif", ".tiff"):
        raise InputError(f"{target}: heights of a scene are written as GeoTIFF; give a name that ends in .tif.")
    with Scene([source]) as scene:
        if len(scene.bands) < 3 or any(band.dtype != "uint8" for band in scene.bands[:3]):
            kinds = ", ".join(band.dtype for band in scene.bands)
            raise InputError(
                f"{source} has bands of {kinds}; heights are told from red, green and blue in 8 bits. Convert it: "
                "gdal_translate -ot Byte -scale -b 1 -b 2 -b 3 IN.tif OUT.tif"
            )
        parts = _parts_folder(target, source, model)
        windows = list(_windows(scene.size))
        begin(len(windows))
        for window, kept in windows:
            part = parts / f"{kept[0]}_{kept[1]}.npy"
            if not part.exists():
                values = _metres(model, scene, window, kept)
                with atomic_path(part) as work, work.open("wb") as file:
                    np.save(file, values)
            advance(1)
        metres = _assemble(scene, parts, [kept for _, kept in windows], target, model)
    shutil.rmtree(parts)
    return SceneHeights(target, scene.size, metres)


def _parts_folder(target: Path, source: str | os.PathLike[str], model: DepthEstimator) -> Path:
    """Of this scene and this model: windows of others are none of ours."""
    headed, status = model.headed, Path(source).stat()
    about = [
        str(source),
        status.st_size,
        status.st_mtime_ns,
        headed.sha256,
        headed.card.sha256,
        headed.engine.precision,
    ]
    digest = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:12]
    folder = target.with_name(f".{target.name}.{digest}.parts")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


Window = tuple[int, int, int, int]
"""(top, left, height, width)."""


def _windows(size: tuple[int, int]) -> Iterator[tuple[Window, Window]]:
    """(what is seen, what of it is kept), both in pixels of the scene; what is kept covers each pixel once."""
    rows, columns = (list(_along(side)) for side in size)
    for top, bottom, first, last in rows:
        for left, right, begin, end in columns:
            yield (top, left, bottom - top, right - left), (first, begin, last - first, end - begin)


def _along(side: int) -> Iterator[tuple[int, int, int, int]]:
    """(begin and end of what is seen, begin and end of what is kept)."""
    done = 0
    bounds = window_bounds(side, crop=_WINDOW, stride=_WINDOW - 2 * _AROUND)
    for number, (begin, end) in enumerate(bounds):
        last = side if number == len(bounds) - 1 else end - _AROUND
        yield begin, end, done, last
        done = last


def _metres(model: DepthEstimator, scene: Scene, window: Window, kept: Window) -> NDArray[np.float32]:
    values, valid = scene.read(window, bands=(0, 1, 2))
    top, left = kept[0] - window[0], kept[1] - window[1]
    inside = (slice(top, top + kept[2]), slice(left, left + kept[3]))
    if not valid[inside].any():
        return np.full(kept[2:], _NODATA, np.float32)
    array = np.ascontiguousarray(values.transpose(1, 2, 0))
    name = f"{scene.sources[0]} at {window[0]}, {window[1]}"
    real = None if valid.all() else valid
    (depth,) = model(Pixels(array=array, valid=real, max_value=255, name=name))
    metres = depth.metres.numpy()
    return np.where(valid, metres, np.float32(_NODATA))[inside]


def _assemble(
    scene: Scene, parts: Path, kept: list[Window], target: Path, model: DepthEstimator
) -> tuple[float, float]:
    module = rasterio()
    profile: dict[str, Any] = {
        "driver": "GTiff",
        "height": scene.size[0],
        "width": scene.size[1],
        "count": 1,
        "dtype": "float32",
        "nodata": _NODATA,
        "crs": scene.crs,
        "transform": scene.affine,
        "tiled": True,
        "BIGTIFF": "IF_SAFER",
    }
    least, most = np.inf, -np.inf
    with atomic_path(target) as work, gdal():
        plain = parts / "plain.tif"
        with module.open(plain, "w", **profile) as file:
            for window in kept:
                values = np.load(parts / f"{window[0]}_{window[1]}.npy")
                file.write(values, 1, window=module.windows.Window(window[1], window[0], window[3], window[2]))
                if (values != _NODATA).any():
                    known = values[values != _NODATA]
                    least, most = min(least, float(known.min())), max(most, float(known.max()))
            file.set_band_description(1, "height above ground")
            file.update_tags(units="metres", model=str(model.headed), software="densedino")
        from rasterio.shutil import copy

        copy(str(plain), str(work), driver="COG", compress="deflate", predictor="yes", BIGTIFF="IF_SAFER")
    return (least, most) if least <= most else (float("nan"), float("nan"))
