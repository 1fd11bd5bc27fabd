"""Owns the extraction of one scene: from files to a store of blended features, the same if it was interrupted."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from densedino.errors import ImageError, InputError
from densedino.features.extract import store_metadata
from densedino.features.quarantine import stamp_of
from densedino.features.scene_sink import SceneSink
from densedino.geo.bands import choose_bands
from densedino.geo.mosaic import Mosaic, Reader
from densedino.geo.radiometry import find_product, make_scaling
from densedino.geo.raster import Scene
from densedino.images.tiling import TilePlan

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence

    from densedino.features.extractor import FeatureExtractor
    from densedino.geo.bands import Chosen
    from densedino.geo.radiometry import Scaling

__all__ = ["SceneJob", "SceneOptions", "SceneReport", "extract_scene"]


@dataclass(frozen=True, kw_only=True)
class SceneOptions:
    """How a scene is read and cut."""

    tile: int = 512
    """Pixels on a side."""
    overlap: int = 128
    """Pixels that neighbours share."""
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
        """The tiles, to run rows of them."""
        return Mosaic(self.dino, self.reader, self.plan, advance=advance)

    def _describe(self) -> dict[str, Any]:
        """Metadata of the store: what one of images says, and `scene`."""
        stride, affine = self.plan.stride, self.scene.affine
        grid_affine = affine @ type(affine).scale(stride, stride)
        base = store_metadata(self.dino)
        base["transform"] = {**base["transform"], "resize": None, "fit": "pad", "max_tokens": None}
        numbers = {
            "sources": [_identity(source) for source in self.scene.sources],
            "size": list(self.scene.size),
            "tile": self.options.tile,
            "overlap": self.options.overlap,
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
    job: SceneJob
    """Closed."""
    rows: int
    """Rows of tiles that were computed now."""
    done_before: int
    damaged: int
    """Places that could not be read, and are not valid."""
    seconds: float


def extract_scene(
    dino: FeatureExtractor,
    sources: Sequence[str | os.PathLike[str]],
    *,
    output: str | os.PathLike[str] = "features",
    options: SceneOptions | None = None,
    announce: Callable[[SceneJob, int], None] = lambda job, tiles: None,
    advance: Callable[[int], None] = lambda count: None,
) -> SceneReport:
    """Compute dense features of a scene of any size in bounded memory, and keep them with their coordinates.

    A run that was interrupted, even killed, goes on where it stopped when it is started again, and ends with the same
    blocks. Read the result with `SceneStore`.

    Args:
        dino: of `dd.load`.
        sources: one raster, or several that are bands of one scene.
        output: folder of the store.
        options: how the scene is read and cut.
        announce: called once, before the work begins, with the job and the number of tiles to run.
        advance: called with the number of tiles that were done.

    Raises:
        ImageError: files that are no rasters, or have no pixels to use.
        InputError: options that make no sense for this scene.
        StoreError: `output` is something else, has other features, or cannot be written.
        MissingExtraError: rasterio is not installed.
    """
    with SceneJob(dino, sources, options or SceneOptions()) as job:
        sink = SceneSink(Path(output), job.metadata)
        before = len(sink.done)
        left = [r for r in range(job.plan.shape[0]) if r not in sink.done]
        mosaic = job.mosaic(advance=advance)
        announce(job, mosaic.cost(left))
        start = time.perf_counter()
        for blocks in mosaic.rows(left):
            sink.append(blocks)
        return SceneReport(
            output=sink.path,
            job=job,
            rows=len(left),
            done_before=before,
            damaged=len(job.scene.damaged),
            seconds=time.perf_counter() - start,
        )
