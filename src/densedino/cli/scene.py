"""Owns `densedino extract SCENE --tile …`: the options of scenes, and what is said before, during and after."""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from densedino.cli.progress import progress
from densedino.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from densedino.features.extractor import FeatureExtractor
    from densedino.features.spread import RayRunner
    from densedino.geo.extraction import SceneJob, SceneReport

__all__ = ["SceneFlags", "is_scene", "run_scene"]


@dataclass(frozen=True, kw_only=True)
class SceneFlags:
    """Of one large raster, or of the files of its bands."""

    tile: int | None = None
    """cut the scene into tiles of so many pixels on a side: 512; any raster, any size, in bounded memory"""
    overlap: int | None = None
    """pixels that neighbouring tiles share and are blended over; a quarter of the tile if not given"""
    context: int = 0
    """show every tile the whole scene too, shrunk to so many pixels on its longer side: 512; 0 for tiles alone"""
    gsd: float | None = None
    """metres per pixel to resample to, such as 0.6 for weights trained on 0.6 m imagery"""
    crs: str | None = None
    """reproject to EPSG:32632, say"""
    nodata: float | None = None
    """the value that means nothing is here, if the file does not say or is wrong"""
    bands: str = "auto"
    """auto, all, true-colour, false-colour, … or one per channel: B4,B3,B2 or 665,560,490 (nm) or 3,2,1 (numbers)"""
    sensor: str = "auto"
    """sentinel-2, landsat-7, landsat-8, landsat-9, naip, planet, planet-8, generic, or auto"""
    scale: str = "auto"
    """16-bit and float values to [0, 1]: physical (reflectance), percentile (of the whole scene), LOW:HIGH, or auto"""
    channels: str = "pca"
    """what a .tif holds: pca (3 colours), pca:8 (8 components), or numbers of features: 0,17,33"""
    no_check: bool = False
    """do not measure how far tiles differ from the scene in one piece"""


def is_scene(flags: SceneFlags, out: str) -> bool:
    """Whether the options are those of a scene."""
    changed = any(getattr(flags, field.name) != field.default for field in fields(flags))
    return changed or out.lower().endswith((".tif", ".tiff", ".zarr", ".geojson", ".gpkg"))


def run_scene(
    load: Callable[[], FeatureExtractor],
    inputs: tuple[str, ...],
    *,
    out: str,
    flags: SceneFlags,
    ray: RayRunner | None = None,
    refused: Sequence[str] = (),
) -> int:
    """Do it, and say where the result is; of a store, only write it in another form.

    `refused` are options that were given, and that scenes have not.
    """
    if refused:
        raise InputError(
            f"{', '.join(refused)}: not for scenes, whose size and values are --tile, --gsd, --bands and --scale. "
            "Leave it out, or leave out --tile."
        )
    from densedino.geo.extraction import SceneOptions, extract_scene
    from densedino.geo.ray_scene import RayScene

    if len(inputs) == 1 and (Path(inputs[0]) / "_versions").is_dir():
        return _export(inputs[0], out, flags.channels)
    options = SceneOptions(
        tile=512 if flags.tile is None else flags.tile,
        overlap=flags.overlap,
        context=flags.context,
        gsd=flags.gsd,
        crs=flags.crs,
        nodata=flags.nodata,
        bands=flags.bands,
        sensor=flags.sensor,
        scale=flags.scale,
    )
    with progress("tiles") as (begin, advance):

        def announce(job: SceneJob, tiles: int) -> None:
            _say_job(job, tiles)
            if tiles:
                begin(tiles)

        report = extract_scene(
            load(),
            inputs,
            output=out,
            options=options,
            channels=flags.channels,
            check=not flags.no_check,
            runner=None if ray is None else RayScene(ray, load),
            announce=announce,
            advance=advance,
        )
    _say_report(report)
    return 1 if report.valid == 0 else 0


def _export(store: str, out: str, channels: str) -> int:
    from densedino.features.scenes import SceneStore
    from densedino.geo.exports import export_scene

    print(f"{export_scene(SceneStore(store), out, channels=channels)}: written from {store}.")
    return 0


def _say_report(report: SceneReport) -> None:
    if report.damaged:
        _note(f"damaged    {report.damaged:,} places of the files cannot be read; their patches are not valid")
    if report.seams is not None:
        _note(
            f"seams      steps between patches at borders of tiles ÷ elsewhere: {report.seams:.3f} (1: no seam shows)"
        )
    if report.error is not None:
        error = report.error
        where = "the scene" if error.whole else f"{error.grid[0]}×{error.grid[1]} patches in its middle"
        _note(f"seam error cosine of tiles to {where} in one piece: {error.mean:.4f} (5th percentile {error.low:.4f})")
    rate = f", {report.tiles / report.seconds:,.1f} tiles/s" if report.tiles else ""
    size = f"{report.grid[0]:,}×{report.grid[1]:,} patches"
    size += f", {report.valid:,} of them valid" if report.valid is not None else ""
    print(f"{report.output}: {size}, {report.rows[0]:,} of {report.rows[1]:,} rows of tiles done now{rate}.")
    if report.valid == 0:
        print(
            "No patch is valid: in each a pixel is nodata, transparent or NaN. If the nodata value is wrong: --nodata"
        )
    suffix = report.output.suffix.lower()
    if suffix == ".zarr":
        print(f"Open: import xarray; scene = xarray.open_zarr({str(report.output)!r})")
    elif suffix in (".tif", ".tiff", ".geojson", ".gpkg"):
        print("It opens in QGIS, in its place.")
    else:
        print(f"Open: import densedino as dd; store = dd.SceneStore({str(report.output)!r})")


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _say_job(job: SceneJob, tiles: int) -> None:
    scene, plan, dino = job.scene, job.plan, job.dino
    untrained = ", UNTRAINED: random numbers, so are the features" if dino.card.untrained else ""
    _note(f"weights    {dino.card.name} ({dino.card.licence}; sha256 {dino.card.sha256[:12]}{untrained})")
    _note(f"engine     {dino.engine.name}: {dino.engine_reason}; {dino.device}, {dino.precision}")
    size = f"{scene.size[0]:,}×{scene.size[1]:,} pixels (H×W)"
    ground = f"{scene.gsd:.3g} m each" if scene.gsd else "no size on the ground"
    crs = (scene.crs.to_string() if scene.crs else "no CRS: places are counted in pixels")[:60]
    _note(f"scene      {size}, {ground}; {crs}")
    _note(f"bands      {', '.join(job.chosen.names)} of {job.chosen.sensor} ({job.chosen.why})")
    _note(f"scaling    {job.scaling.kind}: {'; '.join(job.scaling.notes)}")
    whole = plan.shape[0] * plan.shape[1]
    side = f"{plan.tile[0] * plan.stride}×{plan.tile[1] * plan.stride} pixels"
    patches = plan.grid[0] * plan.grid[1]
    disk = f"{patches:,} patches, {patches * dino.model.embed_dim * 2 / 2**20:,.0f} MiB on disk"
    _note(f"to do      {tiles:,} tiles ({whole:,} in all) of {side}; {disk}")
