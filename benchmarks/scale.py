"""What large jobs cost in core hours and bytes: the arithmetic of docs/scale.md, from costs measured here.

    python benchmarks/scale.py --workers 1 2

Costs are processor seconds per 512 × 512 tile and per 224 × 224 photograph of a whole `extract`, reading and writing
included, in one thread: they do not depend on what else the machine does. `--workers` runs the same photographs by Ray
with so many workers, and prints images a second: what adding workers adds (on idle cores).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from skimage import data

import densedino as dd
from densedino.features.extract import extract
from densedino.features.spread import RayRunner
from densedino.features.work import RayExtraction
from densedino.geo.extraction import SceneOptions, extract_scene


@dataclass(frozen=True)
class Job:
    """A large job, in pixels."""

    name: str
    pixels: float
    """New ones: the overlap of tiles comes on top."""
    pieces: float
    """Tiles or photographs."""


def sentinel_year(*, square_km: float, gsd: float = 10.0, dates: int = 73, tile: int = 512, overlap: int = 128) -> Job:
    """A country, every five days for a year."""
    pixels = square_km * 1e6 / gsd**2 * dates
    return Job(f"Sentinel-2, {square_km:,.0f} km², {dates} dates", pixels, pixels / (tile - overlap) ** 2)


def photographs(*, count: float, side: int = 224) -> Job:
    return Job(f"{count:,.0f} photographs of {side} pixels", count * side**2, count)


def core_hours(job: Job, *, seconds: float) -> float:
    return job.pieces * seconds / 3600


def stored_bytes(job: Job, *, dim: int, stride: int = 16) -> float:
    """Patches in float16."""
    return job.pixels / stride**2 * dim * 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None)
    parser.add_argument("--weights", default=None)
    parser.add_argument("--photos", type=int, default=256)
    parser.add_argument("--workers", type=int, nargs="*", default=[])
    args = parser.parse_args()
    torch.set_num_threads(1)
    load = partial(dd.load, args.model, weights=args.weights)
    dino = load()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        per_tile, per_photo = tile_seconds(dino, folder), photo_seconds(dino, folder, count=args.photos)
        print(f"{dino.card.name}: {per_tile:.3f} core seconds a tile, {per_photo:.4f} a photograph")
        for workers in args.workers:
            rate = ray_rate(load, dino, folder, workers=workers)
            print(f"Ray, {workers} workers: {rate:.1f} images a second, models loaded")
    jobs = ((sentinel_year(square_km=357_000), per_tile), (photographs(count=1e9), per_photo))
    for job, seconds in jobs:
        hours, size = core_hours(job, seconds=seconds), stored_bytes(job, dim=dino.model.embed_dim)
        print(f"{job.name}: {job.pieces:,.0f} pieces, {hours:,.0f} core hours, {size / 1e12:,.2f} TB")


def tile_seconds(dino: dd.FeatureExtractor, folder: Path) -> float:
    photo = np.tile(data.astronaut(), (6, 6, 1))
    Image.fromarray(photo).save(folder / "scene.tif")
    start = time.process_time()
    report = extract_scene(dino, [folder / "scene.tif"], output=folder / "s", options=SceneOptions(), check=False)
    return (time.process_time() - start) / report.tiles


def photo_seconds(dino: dd.FeatureExtractor, folder: Path, *, count: int) -> float:
    (folder / "photos").mkdir()
    photo = Image.fromarray(data.astronaut())
    for number in range(count):
        left, top = 7 * number % 280, 11 * number % 280
        photo.crop((left, top, left + 224, top + 224)).save(folder / "photos" / f"{number}.jpg")
    start = time.process_time()
    extract(dino, [folder / "photos"], output=folder / "f")
    return (time.process_time() - start) / count


def ray_rate(load: partial[dd.FeatureExtractor], dino: dd.FeatureExtractor, folder: Path, *, workers: int) -> float:
    """The time that the first worker takes to begin is not counted."""
    moments = [0.0, 0.0]

    def advance(count: int) -> None:
        moments[0] = moments[0] or time.perf_counter()
        moments[1] = time.perf_counter()

    runner = RayExtraction(RayRunner(workers=workers), load)
    report = extract(dino, [folder / "photos"], output=folder / f"ray{workers}", runner=runner, advance=advance)
    return report.rows / max(moments[1] - moments[0], 1e-9)


if __name__ == "__main__":
    main()
