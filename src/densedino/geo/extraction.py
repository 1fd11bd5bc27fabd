"""Owns the extraction of one scene: from files to a store of blended features, the same if it was interrupted."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from densedino.errors import ImageError, InputError
from densedino.features.extract import store_metadata
from densedino.features.quarantine import stamp_of
from densedino.features.scene_sink import SceneSink
from densedino.features.scenes import SceneStore
from densedino.features.spread import the_share
from densedino.geo.bands import choose_bands
from densedino.geo.exports import SUFFIXES, check_channels, export_scene, is_exported
from densedino.geo.mosaic import Mosaic, Reader, tiles_in_context
from densedino.geo.radiometry import find_product, make_scaling
from densedino.geo.raster import Scene, scaled
from densedino.geo.seams import SeamCounter, measure_seam_error
from densedino.images.tiling import TilePlan

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence

    from densedino.features.extractor import FeatureExtractor
    from densedino.geo.bands import Chosen
    from densedino.geo.radiometry import Scaling
    from densedino.geo.ray_scene import RayScene
    from densedino.geo.seams import SeamError

__all__ = ["SceneJob", "SceneOptions", "SceneReport", "extract_scene"]


@dataclass(frozen=True, kw_only=True)
class SceneOptions:
    """How a scene is read and cut."""

    tile: int = 512
    """Pixels on a side."""
    overlap: int | None = None
    """Pixels that neighbours share; a quarter of the tile if not given."""
    context: int = 0
    """Pixels on the longer side of the whole scene, shrunk, that every tile sees too; 0 for tiles alone."""
    gsd: float | None = None
    """Metres per pixel to resample to."""
    crs: str | None = None
    """To reproject to."""
    nodata: float | None = None
    """Instead of what the files say."""
    bands: str = "auto"
    """See `geo.bands.choose_bands`."""
    sensor: str = "auto"
    scale: str = "auto"
    """See `geo.radiometry.make_scaling`."""


class SceneJob:
    """A scene that is open and ready to be run: its tiles, its bands, and what its store says of itself.

    Any number of processes may have the same job, each for other rows of tiles: `rows` gives the blocks of a row, the
    same whoever computes them, and `SceneSink.append` commits each row once.
    """

    def __init__(
        self, dino: FeatureExtractor, sources: Sequence[str | os.PathLike[str]], options: SceneOptions
    ) -> None:
        if dino.model.training:
            raise InputError("the model is in training mode; call dino.model.eval() first.")
        self.dino, self.options = dino, options
        self.scene = Scene(sources, gsd=options.gsd, crs=options.crs, nodata=options.nodata)
        try:
            stride = dino.model.stride
            if min(self.scene.size) < stride:
                raise ImageError(
                    f"the scene has {self.scene.size[0]}×{self.scene.size[1]} pixels (H×W), less than one "
                    f"{stride}×{stride} patch."
                )
            self.plan = TilePlan.make(self.scene.size, tile=options.tile, overlap=options.overlap, stride=stride)
            self.product = find_product(self.scene.sources)
            self.chosen: Chosen = choose_bands(
                self.scene.bands,
                want=options.bands,
                sensor=options.sensor,
                channels=dino.transform.in_chans,
                hint=self.product.spacecraft if self.product else "",
            )
            self.scaling: Scaling = make_scaling(self.scene, self.chosen, scale=options.scale, product=self.product)
            self.reader = Reader(self.scene, self.chosen, self.scaling, dino)
            self.metadata = self._describe()
        except BaseException:
            self.scene.close()
            raise

    def __enter__(self) -> SceneJob:
        return self

    def __exit__(self, *error: object) -> None:
        self.scene.close()

    def mosaic(self, *, advance: Callable[[int], None] = lambda count: None) -> Mosaic:
        """The tiles, to run rows of them; with `context`, the shrunk scene is run first."""
        window = (0, 0, *self.scene.size)
        run = tiles_in_context(self.dino, self.reader, self.plan, window, context=self.options.context)
        return Mosaic(self.dino, self.reader, self.plan, run=run, advance=advance)

    def _describe(self) -> dict[str, Any]:
        """Metadata of the store: what one of images says, and `scene`."""
        stride, affine = self.plan.stride, self.scene.affine
        grid_affine = scaled(affine, stride, stride)
        base = store_metadata(self.dino)
        base["transform"] = {**base["transform"], "resize": None, "fit": "pad", "max_tokens": None}
        numbers = {
            "sources": [_identity(source) for source in self.scene.sources],
            "size": list(self.scene.size),
            "tile": self.options.tile,
            "overlap": self.plan.overlap * stride,
            "context": self.options.context,
            "gsd": self.options.gsd,
            "crs": self.scene.crs.to_wkt() if self.scene.crs else None,
            "nodata": self.options.nodata,
            "affine": list(grid_affine)[:6],
            "bands": {"sensor": self.chosen.sensor, "names": list(self.chosen.names), "nm": list(self.chosen.nm)},
            "places": list(self.chosen.places),
            "scaling": self.scaling.to_dict(),
        }
        text = json.dumps([base["fingerprint"], numbers], sort_keys=True)
        scene = numbers | {
            "grid": list(self.plan.grid),
            "row_starts": list(self.plan.row_starts),
            "col_starts": list(self.plan.col_starts),
            "pixel_affine": list(affine)[:6],
            "metres_per_pixel": self.scene.gsd,
        }
        return base | {"scene": scene, "fingerprint": hashlib.sha256(text.encode()).hexdigest()}


def _identity(source: str) -> dict[str, Any]:
    """What tells a file from another one, or from itself after a change."""
    path = Path(source)
    if "://" in source or not path.is_file():
        return {"path": source}
    size, mtime = stamp_of(path.stat())
    return {"path": str(path.absolute()), "bytes": size, "mtime_ns": mtime}


@dataclass(frozen=True, kw_only=True)
class SceneReport:
    """What an extraction of a scene came to."""

    output: Path
    grid: tuple[int, int]
    """(h, w) in patches."""
    tiles: int
    """Run now."""
    rows: tuple[int, int]
    """Rows of tiles that were finished now, and all of them."""
    valid: int | None
    """Patches of the whole store all of whose pixels are real; None if it was written before."""
    damaged: int
    """Places that could not be read now; their patches are not valid."""
    seams: float | None
    """Mean step between neighbouring patches at borders of tiles ÷ elsewhere; None where there is no border."""
    error: SeamError | None
    """Of tiles against the scene in one piece; None if that was not measured."""
    seconds: float
    """For the tiles."""


def extract_scene(
    dino: FeatureExtractor,
    sources: Sequence[str | os.PathLike[str]],
    *,
    output: str | os.PathLike[str] = "features",
    options: SceneOptions | None = None,
    channels: str = "pca",
    check: bool = True,
    runner: RayScene | None = None,
    announce: Callable[[SceneJob, int], None] = lambda job, tiles: None,
    advance: Callable[[int], None] = lambda count: None,
) -> SceneReport:
    """Compute dense features of a scene of any size in bounded memory, and keep them with their coordinates.

    A run that was interrupted, even killed, goes on where it stopped when it is started again, and ends with the same
    blocks. Read the result with `SceneStore`.

    Args:
        dino: of `dd.load`.
        sources: one raster, or several that are bands of one scene.
        output: a folder for the store; or a file, of which `geo.exports.export_scene` says what suffixes mean. Then the
            store is a hidden folder beside it until the file is whole.
        options: how the scene is read and cut.
        channels: what a .tif holds (see `export_scene`).
        check: measure how far tiles are from one piece, on at most 1024 × 1024 pixels.
        runner: does the work elsewhere; here if not given. Under torchrun each rank does its share of the rows.
        announce: called once, before the work begins, with the job and the number of tiles to run.
        advance: called with the number of tiles that were done.

    Raises:
        ImageError: files that are no rasters, or have no pixels to use.
        InputError: options that make no sense for this scene.
        StoreError: `output` is something else, has other features, or cannot be written.
        MissingExtraError: rasterio, or what writes the output, is not installed.
    """
    output = Path(output)
    exports = output.suffix.lower() in SUFFIXES
    if exports:
        check_channels(channels, dim=dino.model.embed_dim)
    with SceneJob(dino, sources, options or SceneOptions()) as job, the_share() as share:
        rows = job.plan.shape[0]
        done = exports and is_exported(output, job.metadata["fingerprint"], channels=channels)
        work = output.with_name(f".{output.name}.densedino") if exports else output
        counter, left, tiles, start = SeamCounter(job.plan), [], 0, time.perf_counter()
        if not done:
            sink = SceneSink(work, job.metadata)
            left = [r for r in share.of(rows) if r not in sink.done]
            mosaic = job.mosaic(advance=advance)
            tiles = mosaic.cost(left)
            announce(job, tiles)
            if runner is not None:
                runner(job, work, left, advance=advance)
            for blocks in () if runner is not None else mosaic.rows(left):
                counter.add(blocks)
                sink.append(blocks)
        share.wait()
        seconds = time.perf_counter() - start
        valid = None if done else SceneStore(work).count_valid()
        error = measure_seam_error(job) if check and left and not share.rank else None
        if exports and not done and not share.rank:
            export_scene(SceneStore(work), output, channels=channels)
            shutil.rmtree(work)
        share.wait()
        return SceneReport(
            output=output,
            grid=job.plan.grid,
            tiles=tiles,
            rows=(len(left), rows),
            valid=valid,
            damaged=len(job.scene.damaged),
            seams=counter.ratio,
            error=error,
            seconds=seconds,
        )
