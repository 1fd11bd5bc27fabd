"""Owns maps of a scene: values per patch → values per pixel, strip by strip, as a cloud-optimised GeoTIFF."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from densedino.checkpoint import atomic_path
from densedino.errors import InputError
from densedino.geo.raster import gdal, rasterio

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from densedino.features.scenes import SceneStore

__all__ = ["cog_writer", "own_rows", "strips", "to_pixels"]

_STRIP = 4  # rows of patches that are turned into pixels at once

Strip = tuple[int, "NDArray[np.float16]", "NDArray[np.bool_]"]


def strips(store: SceneStore) -> Iterator[Strip]:
    """Rows of patches of a scene, a few at a time, with a row more on each side where there is one.

    Yields:
        First row without those; patches [h, w, D]; and which are known [h, w]: valid ones, and those at the lower and
        right edge that the picture fills in part.
    """
    held: tuple[int, int, NDArray[np.float16], NDArray[Any]] | None = None
    for top in range(0, store.grid[0], _STRIP):
        first, end = max(top - 1, 0), min(top + _STRIP + 1, store.grid[0])
        if held is None or not (held[0] <= first and end <= held[1]):
            reach = min(first + 16 * _STRIP, store.grid[0])  # blocks are read once or twice, not every time
            patches, valid = store.read(rows=(first, max(reach, end)))
            held = (first, max(reach, end), patches, _known(valid, store, last=max(reach, end) == store.grid[0]))
        part = slice(first - held[0], end - held[0])
        yield top, held[2][part], held[3][part]


def _known(valid: NDArray[np.bool_], store: SceneStore, *, last: bool) -> NDArray[np.bool_]:
    height, width = store.metadata["scene"]["size"]
    known = valid.copy()
    if last and height % store.stride and len(known) > 1:
        known[-1] = known[-2]
    if width % store.stride and known.shape[1] > 1:
        known[:, -1] = known[:, -2]
    return known


def to_pixels(values: Tensor, known: NDArray[np.bool_], *, top: int, store: SceneStore) -> tuple[Tensor, Tensor]:
    """Values per patch of a strip [h, w, C] → values per pixel [C, H, W] and which are known [H, W].

    Bilinear between the centres of patches, in which only known ones have a part. The strip's own rows alone.
    """
    stride, (height, width) = store.stride, store.metadata["scene"]["size"]
    weight = torch.from_numpy(known)[..., None].float()
    both = torch.cat([torch.where(weight > 0, values.float(), 0.0), weight], -1).permute(2, 0, 1)[None]
    fine = F.interpolate(both, scale_factor=stride, mode="bilinear", align_corners=False)[0, :, :, :width]
    skip = 0 if top == 0 else stride
    own = slice(skip, skip + min(_STRIP * stride, height - top * stride))
    fine = fine[:, own]
    mask = torch.from_numpy(known).repeat_interleave(stride, 0).repeat_interleave(stride, 1)[own, :width]
    return fine[:-1] / fine[-1:].clamp(min=1e-6), mask


def own_rows(top: int, store: SceneStore) -> slice:
    """The rows of a strip's arrays that are its own."""
    skip = min(top, 1)
    return slice(skip, skip + min(_STRIP, store.grid[0] - top))


@contextmanager
def cog_writer(
    path: Path,
    store: SceneStore,
    *,
    bands: tuple[str, ...],
    dtype: str,
    nodata: float,
    tags: Mapping[str, str],
    per_patch: bool = False,
    colours: Mapping[int, tuple[int, int, int]] | None = None,
) -> Iterator[Callable[[int, NDArray[Any]], None]]:
    """A function write(first row, array [bands, rows, columns]); at the end `path` is a whole COG, or nothing at all.

    Args:
        path: ends in .tif.
        store: whose grid, or pixels, the map has.
        bands: what they are called.
        dtype: of all bands.
        nodata: the value that means that nothing is known.
        tags: metadata of the file.
        per_patch: one pixel per patch.
        colours: of the values of the first band.

    Raises:
        InputError: the name does not end in .tif, or the disk is full.
        MissingExtraError: rasterio is not installed.
    """
    module = rasterio()
    if path.suffix.lower() not in (".tif", ".tiff"):
        raise InputError(f"-o {path}: maps of scenes are written as GeoTIFF; give a name that ends in .tif.")
    scene = store.metadata["scene"]
    height, width = store.grid if per_patch else scene["size"]
    affine = module.Affine(*(scene["affine"] if per_patch else scene["pixel_affine"]))
    options = {"driver": "GTiff", "tiled": True, "blockxsize": 512, "blockysize": 512, "BIGTIFF": "IF_SAFER"}
    profile = {"count": len(bands), "dtype": dtype, "nodata": nodata, "crs": store.crs, "transform": affine}
    with atomic_path(path) as work, gdal():
        plain = work.with_name("plain.tif")
        try:
            with module.open(plain, "w", height=height, width=width, compress="zstd", **options, **profile) as file:
                file.descriptions = bands
                file.update_tags(**tags)
                if colours:
                    file.write_colormap(1, dict(colours))
                yield lambda top, array: file.write(array, window=((top, top + array.shape[1]), (0, array.shape[2])))
            from rasterio.shutil import copy

            copy(str(plain), str(work), driver="COG", compress="deflate", overviews="auto", BIGTIFF="IF_SAFER")
        except module.errors.RasterioError as error:
            raise InputError(f"{str(path)!r} cannot be written: {error}. Is there space on the disk?") from error
