"""Owns writing a scene's store in the forms that others open: Zarr with coordinates, a COG, polygons of patches.

Each is written in pieces that fit into memory, and is there when it is whole.
"""

from __future__ import annotations

import json
import re
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from densedino.checkpoint import atomic_path
from densedino.errors import InputError, StoreError, require
from densedino.features.colours import PcaBasis, fit_pca
from densedino.geo.raster import gdal, rasterio
from densedino.geo.vectors import Shapes, cells, write_vectors

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from densedino.features.scenes import SceneStore

__all__ = ["SUFFIXES", "check_channels", "cog_writer", "export_scene", "is_exported", "panels"]

_PANEL = (64, 512)  # patches (h, w) that are in memory at a time
_SAMPLE = 40_000  # patches, of which principal components are taken
SUFFIXES = (".zarr", ".tif", ".tiff", ".geojson", ".gpkg")
"""Of what a scene can be written to, besides its store."""


def export_scene(store: SceneStore, path: str | os.PathLike[str], *, channels: str = "pca") -> Path:
    """Write a scene's features as the suffix of `path` says.

    .zarr: Zarr 3 with `patches` (y, x, channel) in float16, `valid`, `cls` per block, coordinates of the centres of
    patches, and the CRS as CF and GDAL write it; `xarray.open_zarr` reads it. .tif: a COG with a pixel per patch.
    .geojson, .gpkg: a polygon per valid patch, with its row, column and PCA colour.

    Args:
        store: complete.
        path: replaced if it exists.
        channels: what a .tif holds: "pca" (three colours, 8-bit, with alpha), "pca:8" (as many whitened components,
            float32), or numbers of features ("0,17,33", float32). What is not valid is transparent, or NaN.

    Raises:
        InputError: another suffix, or channels that there are not.
        StoreError: the store is not complete.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"{str(path)!r}: a scene is written to {', '.join(SUFFIXES)}, or a folder as a store.")
    if not store.complete:
        raise StoreError(f"{store} is not complete. Run the same `densedino extract` again to finish it.")
    with gdal():
        if path.suffix == ".zarr":
            _write_zarr(store, path)
        elif path.suffix in (".tif", ".tiff"):
            _write_features(store, path, channels)
        else:
            basis = _basis(store, 3)
            shapes = (_polygons(store, basis, top, left, p, v) for top, left, p, v in panels(store))
            write_vectors(path, shapes, crs=store.crs, metadata=_about(store))
    return path


def is_exported(path: Path, fingerprint: str, *, channels: str) -> bool:
    """Whether a .zarr or .tif stands already that was written of the same features."""
    if path.suffix == ".zarr" and (path / "zarr.json").is_file():
        attributes = json.loads((path / "zarr.json").read_text()).get("attributes", {})
        return bool(attributes.get("fingerprint") == fingerprint)
    if path.suffix in (".tif", ".tiff") and path.is_file():
        with gdal(), rasterio().open(path) as file:
            about = json.loads(file.tags().get("DENSEDINO", "{}"))
        return (about.get("fingerprint"), about.get("channels")) == (fingerprint, channels)
    return False


def panels(store: SceneStore) -> Iterator[tuple[int, int, NDArray[np.float16], NDArray[np.bool_]]]:
    """(top, left, patches [h, w, D], valid [h, w]) of rectangles that tile the grid."""
    for top in range(0, store.grid[0], _PANEL[0]):
        for left in range(0, store.grid[1], _PANEL[1]):
            rows = (top, min(top + _PANEL[0], store.grid[0]))
            cols = (left, min(left + _PANEL[1], store.grid[1]))
            yield top, left, *store.read(rows=rows, cols=cols)


def _about(store: SceneStore) -> dict[str, Any]:
    """What every output says of where its numbers come from."""
    return {
        "model": store.metadata["model"],
        "weights": store.card.name,
        "licence": store.card.licence,
        "untrained": store.metadata["untrained"],
        "fingerprint": store.metadata["fingerprint"],
    }


def _basis(store: SceneStore, components: int) -> PcaBasis:
    tokens = torch.from_numpy(store.sample(_SAMPLE).astype(np.float32))
    if not len(tokens):
        raise InputError(f"{store} has no valid patch to make colours of: all is nodata, or smaller than a patch.")
    border = torch.zeros(len(tokens), dtype=torch.bool)
    return fit_pca(tokens, border=border, foreground=False, components=components)


# --- Zarr ---


def _write_zarr(store: SceneStore, path: Path) -> None:
    zarr = require("zarr", extra="geo", purpose="writing Zarr")
    (height, width), dim = store.grid, store.dim
    if path.exists():
        _remove_ours(path)
    with atomic_path(path, directory=True) as scratch:
        root = zarr.create_group(str(scratch), zarr_format=3)
        chunk = (min(_PANEL[0], height), min(_PANEL[0], width))

        def array(name: str, shape: tuple[int, ...], dtype: str, dims: tuple[str, ...], chunks: tuple[int, ...]) -> Any:
            return root.create_array(name, shape=shape, dtype=dtype, chunks=chunks or "auto", dimension_names=dims)

        patches = array("patches", (height, width, dim), "float16", ("y", "x", "channel"), (*chunk, dim))
        valid = array("valid", (height, width), "bool", ("y", "x"), chunk)
        for top, left, tokens, real in panels(store):
            here = (slice(top, top + real.shape[0]), slice(left, left + real.shape[1]))
            patches[here], valid[here] = tokens, real
        names = _write_coordinates(store, array)
        about = {"grid_mapping": "spatial_ref", "long_name": "patch features after the final norm"}
        patches.attrs.update({**about, "coordinates": " ".join(["valid", "spatial_ref", *names])})
        root.attrs.update({"densedino": json.dumps(store.metadata, sort_keys=True), **_about(store)})
        with warnings.catch_warnings():  # not part of the Zarr 3 specification, but what xarray looks for first
            warnings.simplefilter("ignore", zarr.errors.ZarrUserWarning)
            zarr.consolidate_metadata(str(scratch))


def _write_coordinates(store: SceneStore, array: Callable[..., Any]) -> list[str]:
    """Write centres of patches; return the names of two-dimensional ones, where the grid is rotated against the CRS."""
    (height, width), (a, b, c, d, e, f) = store.grid, store.affine
    row, col = np.arange(height) + 0.5, np.arange(width) + 0.5
    names = {"x": "projection_x_coordinate", "y": "projection_y_coordinate"}
    if b == 0 and d == 0:
        values: dict[str, tuple[tuple[str, ...], NDArray[Any]]]
        values = {"x": (("x",), a * col + c), "y": (("y",), e * row + f)}
    else:
        names = {f"{axis}c": name for axis, name in names.items()}
        values = {
            "xc": (("y", "x"), a * col + b * row[:, None] + c),
            "yc": (("y", "x"), d * col + e * row[:, None] + f),
        }
    for name, (dims, numbers) in values.items():
        out = array(name, numbers.shape, "float64", dims, ())
        out[...] = numbers
        out.attrs.update({"standard_name": names[name]} if store.crs else {"units": "pixels"})
    reference = array("spatial_ref", (), "int64", (), ())
    transform = " ".join(repr(float(value)) for value in (c, a, b, f, d, e))
    reference.attrs.update({"GeoTransform": transform} | ({"crs_wkt": store.crs} if store.crs else {}))
    return [name for name in values if len(name) > 1]


def _remove_ours(path: Path) -> None:
    import shutil

    description = path / "zarr.json"
    if not description.is_file() or "densedino" not in json.loads(description.read_text()).get("attributes", {}):
        raise StoreError(
            f"{str(path)!r} stands already, and densedino did not write it. Choose another output with -o."
        )
    shutil.rmtree(path)


# --- COG ---


def _write_features(store: SceneStore, path: Path, channels: str) -> None:
    project, names, dtype = _projection(store, channels)
    with cog_writer(path, store, count=len(names), dtype=dtype) as write:
        for top, left, tokens, valid in panels(store):
            write(top, left, project(torch.from_numpy(tokens.astype(np.float32))), valid)
        write.describe(names, {**_about(store), "channels": channels})


def check_channels(channels: str, *, dim: int) -> None:
    """Raise if `channels` is none of what features of `dim` numbers can be written as.

    Raises:
        InputError: it is not; the message says what is valid.
    """
    if channels == "pca":
        return
    if found := re.fullmatch(r"pca:(\d+)", channels):
        if not 1 <= int(found[1]) <= dim:
            raise InputError(f"channels {channels!r}: these features have 1 to {dim} components.")
        return
    if not re.fullmatch(r"\d+(,\d+)*", channels):
        raise InputError(f"channels {channels!r}: give pca, pca:8, or numbers of features from 0: 0,17,33.")
    if max(map(int, channels.split(","))) >= dim:
        raise InputError(f"channels {channels!r}: these features are numbered 0 to {dim - 1}.")


def _projection(store: SceneStore, channels: str) -> tuple[Callable[[torch.Tensor], NDArray[Any]], list[str], str]:
    """From patches [h, w, D] to bands [h, w, C]; the bands' names and type."""
    check_channels(channels, dim=store.dim)
    if channels == "pca":
        basis = _basis(store, 3)
        names = ["red", "green", "blue"]
        return lambda x: (basis.colours(basis.project(x)) * 255).round().byte().numpy(), names, "uint8"
    if channels.startswith("pca:"):
        count = int(channels[4:])
        whitened = _basis(store, count)
        names = [f"component {n + 1}" for n in range(count)]
        return lambda x: whitened.project(x)[..., 1:].numpy(), names, "float32"
    numbers = [int(part) for part in channels.split(",")]
    return lambda x: x[..., numbers].numpy(), [f"feature {n}" for n in numbers], "float32"


class _Writer:
    """Puts rectangles into a raster that is being written."""

    def __init__(self, file: Any, *, alpha: bool) -> None:
        self._file, self._alpha = file, alpha

    def __call__(self, top: int, left: int, values: NDArray[Any], valid: NDArray[np.bool_]) -> None:
        """Bands [h, w, C] at patch (top, left); where not `valid`, transparent or NaN."""
        window = rasterio().windows.Window(left, top, values.shape[1], values.shape[0])
        bands = values.transpose(2, 0, 1)
        if self._alpha:
            bands = np.concatenate([np.where(valid, bands, 0), (valid * np.uint8(255))[None]]).astype(np.uint8)
        else:
            bands = np.where(valid, bands, np.nan).astype(np.float32)
        self._file.write(bands, window=window)

    def describe(self, names: list[str], tags: dict[str, Any]) -> None:
        """Name the bands, and say what they are."""
        for number, name in enumerate(names, start=1):
            self._file.set_band_description(number, name)
        self._file.update_tags(DENSEDINO=json.dumps(tags, sort_keys=True))


@contextmanager
def cog_writer(path: Path, store: SceneStore, *, count: int, dtype: str) -> Iterator[_Writer]:
    """A function that puts bands [h, w, count] at (top, left) of a COG of a pixel per patch, which is there at the end.

    dtype "uint8" adds an alpha band; "float32" has NaN for nothing.
    """
    module = rasterio()
    from rasterio.shutil import copy as copy_raster

    alpha = dtype == "uint8"
    options = {
        "height": store.grid[0],
        "width": store.grid[1],
        "count": count + alpha,
        "dtype": dtype,
        "crs": store.crs,
        "transform": module.Affine(*store.affine),
        "nodata": None if alpha else float("nan"),
    }
    layout = {"tiled": True, "blockxsize": 256, "blockysize": 256, "compress": "deflate", "BIGTIFF": "IF_SAFER"}
    if alpha and count == 3:
        layout |= {"photometric": "RGB", "ALPHA": "YES"}
    with atomic_path(path) as scratch:
        raw = scratch.with_name("raw.tif")
        with module.open(raw, "w", driver="GTiff", **options, **layout) as file:
            yield _Writer(file, alpha=alpha)
        copy_raster(raw, scratch, driver="COG", COMPRESS="DEFLATE", OVERVIEW_RESAMPLING="AVERAGE", BIGTIFF="IF_SAFER")
        raw.unlink()


# --- polygons ---


def _polygons(
    store: SceneStore, basis: PcaBasis, top: int, left: int, patches: NDArray[np.float16], valid: NDArray[np.bool_]
) -> Shapes:
    i, j = np.nonzero(valid)
    tokens = torch.from_numpy(patches[i, j].astype(np.float32))
    rgb = (basis.colours(basis.project(tokens)) * 255).round().byte().tolist()
    properties: dict[str, Any] = {
        "row": i + top,
        "col": j + left,
        "colour": [f"#{r:02x}{g:02x}{b:02x}" for r, g, b in rgb],
    }
    return Shapes(rings=cells(store.affine, i + top, j + left), properties=properties)
