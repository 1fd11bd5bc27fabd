"""Owns opening rasters of any size as one scene, and reading any window of it: values, and which pixels are real.

A scene is one file with several bands, or several files with one band each, as satellite products come. Nothing is read
but the window asked for (and what GDAL keeps in its block cache, which is bounded here).
"""

from __future__ import annotations

import math
import warnings
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from densedino.errors import ImageError, InputError, require

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Sequence
    from types import TracebackType

    from numpy.typing import NDArray

__all__ = ["RasterBand", "Scene", "gdal", "metres_per_pixel", "rasterio", "scaled"]

_CACHE_MB = 192  # of GDAL's decoded blocks: the rows of blocks that a row of tiles spans, of a scene 32,768 wide
_PIECE = 64  # pixels on a side, of what is given up at once where a file is damaged


def rasterio() -> Any:
    """The rasterio module.

    Raises:
        MissingExtraError: it is not installed.
    """
    for part in ("enums", "errors", "vrt", "warp", "windows"):
        require(f"rasterio.{part}", extra="geo", purpose="reading and writing scenes")
    return require("rasterio", extra="geo", purpose="reading and writing scenes")


@contextmanager
def gdal() -> Iterator[None]:
    """GDAL's settings for scenes: a bounded cache, and no warnings about missing coordinates."""
    module = rasterio()
    with module.Env(GDAL_CACHEMAX=_CACHE_MB), warnings.catch_warnings():
        warnings.simplefilter("ignore", module.errors.NotGeoreferencedWarning)
        yield


@dataclass(frozen=True, kw_only=True)
class RasterBand:
    """What a file says of one of its bands."""

    source: str
    """Path of the file."""
    number: int
    """In the file, from 1."""
    description: str
    """"" if there is none."""
    colour: str
    """GDAL's colour interpretation: red, green, blue, gray, alpha, undefined …"""
    scale: float
    offset: float
    """Value = scale · number + offset, as the file says; 1 and 0 if it says nothing."""
    dtype: str
    nodata: float | None
    wavelength: float | None = None
    """Nanometres, as the file says."""


class Scene:
    """An open scene. Use it in a `with`; one thread at a time may read.

    Args:
        sources: one raster, or several that show the same place; the finest decides the grid, others are warped to it.
        gsd: metres per pixel to resample to.
        crs: to reproject to, "EPSG:32632" or WKT.
        nodata: the value that means "nothing here", instead of what files say; resampling is by nearest pixels then.

    Raises:
        ImageError: a file that cannot be read as a raster.
        InputError: files that do not fit together, or a `gsd` or `crs` that cannot be had.
    """

    def __init__(
        self,
        sources: Sequence[str | os.PathLike[str]],
        *,
        gsd: float | None = None,
        crs: str | None = None,
        nodata: float | None = None,
    ) -> None:
        if not sources:
            raise InputError("no raster given: densedino extract SCENE.tif --tile 512 -o out")
        self.sources = tuple(str(source) for source in sources)
        self._nodata = nodata
        self._stack = ExitStack()
        self._stack.enter_context(gdal())
        try:
            opened = [self._stack.enter_context(_open(source)) for source in self.sources]
            self._files = self._aligned(opened, crs)
            self._settle(gsd)
        except BaseException:
            self._stack.close()
            raise
        self.bands: tuple[RasterBand, ...] = tuple(
            band for name, file in zip(self.sources, opened, strict=True) for band in _describe(name, file)
        )
        self._places = [(k, n) for k, file in enumerate(opened) for n in range(1, file.count + 1)]
        self._palettes = [_palette(file) for file in opened]
        self.tags: dict[str, str] = {**opened[0].tags()}
        self.damaged: list[tuple[int, int, int, int]] = []
        """(top, left, height, width) of what could not be read, so far."""

    def __enter__(self) -> Scene:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        self._stack.close()

    def _aligned(self, opened: list[Any], crs: str | None) -> list[Any]:
        """The files on one grid: that of the finest, or of its image in `crs`."""
        module = rasterio()
        finest = min(opened, key=lambda file: abs(file.transform.determinant))
        self._reference = finest
        if crs is not None:
            self._reference = self._stack.enter_context(_warped(finest, crs, name=self.sources[opened.index(finest)]))
        reference, out = self._reference, []
        for name, file in zip(self.sources, opened, strict=True):
            same = file.shape == reference.shape and file.crs == reference.crs
            if file is reference or (same and file.transform.almost_equals(reference.transform)):
                out.append(file)
                continue
            if file.crs is None or reference.crs is None:
                raise InputError(
                    f"{name!r} has {file.shape[0]}×{file.shape[1]} pixels and {'no' if file.crs is None else 'a'} "
                    f"CRS, but the scene's grid has {reference.shape[0]}×{reference.shape[1]} and "
                    f"{'no' if reference.crs is None else 'a'} CRS. Without a CRS all bands need one size."
                )
            options = {
                "crs": reference.crs,
                "transform": reference.transform,
                "width": reference.width,
                "height": reference.height,
                "resampling": module.enums.Resampling.bilinear,
            }
            out.append(self._stack.enter_context(module.vrt.WarpedVRT(file, **options)))
        return out

    def _settle(self, gsd: float | None) -> None:
        """Size, affine and CRS of the scene, after resampling to `gsd`."""
        reference = self._reference
        self.crs = reference.crs
        self.native_gsd = metres_per_pixel(reference.crs, reference.transform, reference.shape)
        """Metres per pixel of the files; None without a CRS."""
        if gsd is not None and not (math.isfinite(gsd) and gsd > 0):
            raise InputError(f"gsd is {gsd}; give metres per pixel, such as 0.6.")
        if gsd is not None and self.native_gsd is None:
            raise InputError(
                f"{self.sources[0]!r} has no CRS, so that its pixels have no size in metres, and gsd={gsd:g} means "
                "nothing. Fix: leave --gsd out, or give the file its CRS (gdal_edit.py -a_srs EPSG:… FILE)."
            )
        factor = 1.0 if gsd is None or self.native_gsd is None else self.native_gsd / gsd
        height, width = (max(1, round(n * factor)) for n in reference.shape)
        self.size: tuple[int, int] = (height, width)
        """(H, W) in pixels."""
        self._steps = (reference.height / height, reference.width / width)
        self.affine = scaled(reference.transform, self._steps[1], self._steps[0])
        """From (column, row) in pixels from the top left corner to ground coordinates."""
        self.gsd = None if self.native_gsd is None else self.native_gsd / factor

    def read(
        self, window: tuple[int, int, int, int], *, bands: Sequence[int], out: tuple[int, int] | None = None
    ) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Values [C, h, w] in the files' own type and `valid` [h, w]: no nodata, no transparency, no NaN in any band.

        Pixels of damaged parts of a file are 0 and not valid, and noted in `damaged`.

        Args:
            window: (top, left, height, width) in pixels of the scene.
            bands: numbers in `self.bands`, from 0.
            out: size to shrink the window to, by averaging; overviews are used.
        """
        size = out or window[2:]
        try:
            return self._read(window, bands, size)
        except rasterio().errors.RasterioError:
            if size != window[2:]:
                raise
        array, valid = None, np.zeros(size, np.bool_)
        for top in range(0, size[0], _PIECE):
            for left in range(0, size[1], _PIECE):
                piece = (slice(top, top + _PIECE), slice(left, left + _PIECE))
                shape = valid[piece].shape
                place = (window[0] + top, window[1] + left, *shape)
                try:
                    values, valid[piece] = self._read(place, bands, shape)
                except rasterio().errors.RasterioError:
                    self.damaged.append(place)
                    continue
                array = np.zeros((len(bands), *size), values.dtype) if array is None else array
                array[:, *piece] = values
        return (np.zeros((len(bands), *size), np.uint8) if array is None else array), valid

    def _read(
        self, window: tuple[int, int, int, int], bands: Sequence[int], size: tuple[int, int]
    ) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        module = rasterio()
        (top, left, height, width), (down, right) = window, self._steps
        shrinks = max(height * down / size[0], width * right / size[1]) > 1
        kind = module.enums.Resampling.average if shrinks else module.enums.Resampling.bilinear
        options: dict[str, Any] = {
            "window": module.windows.Window(left * right, top * down, width * right, height * down),
            "out_shape": size,
        }
        planes, valid = [], np.ones(size, np.bool_)
        # Alpha is real above 0; of a nodata mask, what is averaged must be real in whole.
        same = (height * down, width * right) == size
        least = [1 if same else 128 if file.colorinterp[-1].name == "alpha" else 255 for file in self._files]
        for place in bands:
            k, number = self._places[place]
            file, palette = self._files[k], self._palettes[k]
            # What must not be averaged: numbers of a palette, and nodata that GDAL does not know of.
            whole = palette is None and self._nodata is None
            resampling = kind if whole else module.enums.Resampling.nearest
            plane = file.read(number, resampling=resampling, **options)
            if self._nodata is None:
                valid &= file.read_masks(number, resampling=kind, **options) >= least[k]
            else:
                valid &= plane != self._nodata
            if plane.dtype.kind == "f":
                valid &= np.isfinite(plane)
            planes += [plane] if palette is None else list(palette[plane].transpose(2, 0, 1))
        return np.stack(planes), valid


def _open(source: str) -> Any:
    module = rasterio()
    try:
        file = module.open(source)
    except module.errors.RasterioError as error:
        path = Path(source)
        reason = "there is no such file" if "://" not in source and not path.exists() else str(error)
        if "://" not in source and path.is_file() and not path.stat().st_size:
            reason = "the file is empty"
        raise ImageError(f"{source!r} cannot be read as a raster: {reason.rstrip('.')}.") from None
    if not file.count:
        inside = ", ".join(file.subdatasets[:3])
        file.close()
        raise ImageError(f"{source!r} holds several rasters, and no band of its own. Give one of them: {inside} …")
    if any(np.dtype(dtype).kind == "c" for dtype in file.dtypes):
        file.close()
        raise ImageError(f"{source!r} holds complex numbers. Make them real first: amplitude, or decibels.")
    return file


def _warped(file: Any, crs: str, *, name: str) -> Any:
    module = rasterio()
    if file.crs is None:
        raise InputError(
            f"{name!r} has no CRS and cannot be reprojected to {crs!r}. Fix: gdal_edit.py -a_srs EPSG:… FILE."
        )
    try:
        return module.vrt.WarpedVRT(
            file, crs=crs, resampling=module.enums.Resampling.bilinear, add_alpha=file.nodata is None
        )
    except (module.errors.RasterioError, module.errors.CRSError) as error:
        raise InputError(f"crs {crs!r} cannot be used: {error}. Valid: EPSG:32632, or WKT.") from None


def _describe(source: str, file: Any) -> tuple[RasterBand, ...]:
    return tuple(
        RasterBand(
            source=source,
            number=number,
            description=file.descriptions[number - 1] or "",
            colour=file.colorinterp[number - 1].name,
            scale=float(file.scales[number - 1]),
            offset=float(file.offsets[number - 1]),
            dtype=file.dtypes[number - 1],
            nodata=file.nodatavals[number - 1],
            wavelength=_wavelength(file.tags(number)),
        )
        for number in range(1, file.count + 1)
    )


def _wavelength(tags: dict[str, str]) -> float | None:
    """Nanometres, of a band's tags as ENVI files and others have them."""
    lower = {key.lower(): value for key, value in tags.items()}
    try:
        value = float(lower.get("wavelength", lower.get("central_wavelength_nm", "")))
    except ValueError:
        return None
    unit = lower.get("wavelength_units", "micro" if value < 100 else "nano").lower()
    return value * 1000 if unit.startswith(("micro", "um", "µm")) else value


def _palette(file: Any) -> NDArray[np.uint8] | None:
    """RGB [256, 3] of a file of one band with a colour table."""
    if file.count != 1 or file.colorinterp[0].name != "palette":
        return None
    table = np.zeros((256, 3), np.uint8)
    for index, colour in file.colormap(1).items():
        table[index] = colour[:3]
    return table


def scaled(affine: Any, right: float, down: float) -> Any:
    """The affine of cells that are `right` pixels wide and `down` pixels high."""
    a, b, c, d, e, f = tuple(affine)[:6]
    return rasterio().Affine(a * right, b * down, c, d * right, e * down, f)


def metres_per_pixel(crs: Any, affine: Any, size: tuple[int, int]) -> float | None:
    """Side of a pixel in the middle of a raster, in metres on the ground; None without a CRS.

    Measured in an equidistant projection centred there, so that degrees, feet and web Mercator come out right.
    """
    if crs is None:
        return None
    module = rasterio()
    row, col = size[0] / 2, size[1] / 2
    corners = ((col, row), (col + 1, row), (col, row + 1))
    a, b, c, d, e, f = tuple(affine)[:6]
    xs, ys = [a * i + b * j + c for i, j in corners], [d * i + e * j + f for i, j in corners]
    try:
        (lon, *_), (lat, *_) = module.warp.transform(crs, "OGC:CRS84", xs, ys)
        local = module.crs.CRS.from_proj4(f"+proj=aeqd +lat_0={lat} +lon_0={lon} +datum=WGS84 +units=m")
        xs, ys = module.warp.transform(crs, local, xs, ys)
    except (module.errors.RasterioError, module.errors.CRSError):
        return None  # a local CRS that is tied to no place on Earth
    area = abs((xs[1] - xs[0]) * (ys[2] - ys[0]) - (xs[2] - xs[0]) * (ys[1] - ys[0]))
    return math.sqrt(area) if area > 0 and math.isfinite(area) else None
