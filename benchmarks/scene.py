"""What a scene of any size takes: memory, time per tile, and how much of the pure forward throughput is left.

    python benchmarks/scene.py --sizes 2048 4096 8192 --wide 32768

For each size a mosaic of scikit-image's photographs is written as a tiled GeoTIFF (SIZE × SIZE, 3 × 8 bits) and
extracted in a process of its own, which reports its peak resident memory and the time per tile. `--wide W` does it for
a scene W wide and 2,048 high: memory depends on the width alone, so that this is the peak of W × W in less time.

Pure forward: the same tiles, read and normalised beforehand, through the model alone, with the same threads. The other
way: reading, scaling, the model, blending, writing. Both run in turns on one row of tiles; figures are medians. On a
machine that others use at the same time, the ratio of processor times is the steadier figure.

`--crop N` compares tiles with one piece on N × N pixels, without and with context, and says whether seams show.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import densedino as dd
from densedino.features.planning import Settings
from densedino.features.scene_sink import SceneSink
from densedino.geo.extraction import SceneJob, SceneOptions, extract_scene
from densedino.geo.seams import SeamCounter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="*", default=[2048, 4096])
    parser.add_argument("--wide", type=int, default=0)
    parser.add_argument("--crop", type=int, default=0)
    parser.add_argument("--contexts", type=int, nargs="*", default=[0, 512, 1024])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default=None)
    parser.add_argument("--weights", default=None)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(*map(Path, args.one), model=args.model, weights=args.weights, rounds=args.rounds)))
        return
    with tempfile.TemporaryDirectory() as folder:
        shapes = [(size, size) for size in args.sizes] + ([(2048, args.wide)] if args.wide else [])
        for height, width in shapes:
            path = Path(folder) / "scene.tif"
            write_mosaic(path, height, width)
            command = [sys.executable, __file__, "--one", str(path), f"{folder}/{height}x{width}"]
            command += ["--rounds", str(args.rounds)]
            command += [
                part for name in ("model", "weights") if (value := getattr(args, name)) for part in (f"--{name}", value)
            ]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            print(f"{height}×{width}: " + ", ".join(f"{key} {value:.3f}" for key, value in found.items()), flush=True)
        if args.crop:
            path = Path(folder) / "crop.tif"
            write_mosaic(path, args.crop, args.crop)
            compare(path, args.contexts, model=args.model, weights=args.weights)


def write_mosaic(path: Path, height: int, width: int) -> None:
    """Photographs side by side and mirrored, a band of blocks at a time."""
    import rasterio
    from skimage import data

    photos = [np.asarray(getattr(data, name)())[:400, :400] for name in ("astronaut", "coffee", "rocket", "chelsea")]
    photos = [
        np.pad(photo, ((0, 0), (0, 400 - photo.shape[1]), (0, 0)), "reflect") for photo in photos if len(photo) >= 300
    ]
    photos = [np.pad(photo, ((0, 400 - photo.shape[0]), (0, 0), (0, 0)), "reflect") for photo in photos]
    options = {"driver": "GTiff", "height": height, "width": width, "count": 3, "dtype": "uint8", "crs": "EPSG:32632"}
    layout = {"tiled": True, "blockxsize": 512, "blockysize": 512, "compress": "deflate", "zlevel": 1, "BIGTIFF": "YES"}
    transform = rasterio.Affine(0.6, 0, 5e5, 0, -0.6, 5e6)
    random = np.random.default_rng(0)
    row = np.concatenate([photos[k % len(photos)][:, :: (-1) ** k] for k in range(-(-width // 400))], axis=1)[:, :width]
    with rasterio.open(path, "w", transform=transform, **options, **layout) as file:
        for top in range(0, height, 512):
            lines = (np.arange(top, min(top + 512, height)) + int(random.integers(400))) % 400
            band = row[lines].transpose(2, 0, 1)
            file.write(band, window=rasterio.windows.Window(0, top, width, band.shape[1]))


def one(path: Path, output: Path, *, model: str | None, weights: str | None, rounds: int) -> dict[str, float]:
    """Extract a scene, then measure the ratio on a row of its tiles."""
    dino = dd.load(model, weights=weights, engine="eager")
    dino(np.zeros((512, 512, 3), np.uint8))
    tiles = []
    start, used = time.perf_counter(), time.process_time()
    extract_scene(dino, [path], output=output, check=False, advance=tiles.append)
    wall, cpu = time.perf_counter() - start, time.process_time() - used
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    count = sum(tiles)
    found = {"tiles": count, "peak_GiB": peak, "s_per_tile": wall / count, "cpu_s_per_tile": cpu / count}
    return found | ratio(dino, path, output.with_suffix(".again"), rounds=rounds)


def ratio(dino: dd.FeatureExtractor, path: Path, output: Path, *, rounds: int) -> dict[str, float]:
    with SceneJob(dino, [path], SceneOptions()) as job:
        tiles = [(0, c) for c in range(min(job.plan.shape[1], 24))]
        prepared = [job.reader(job.plan.pixels_of(*tile)) for tile in tiles]
        settings = Settings.choose(dino.device, inputs=2 * len(tiles), batch_size=None)
        times: dict[str, list[tuple[float, float]]] = {"forward": [], "extract": []}
        for turn in range(rounds):
            sink = SceneSink(output.with_suffix(f".{turn}"), job.metadata)

            def forward() -> int:
                options = {"initializer": torch.set_num_threads, "initargs": (settings.threads,)}
                with ThreadPoolExecutor(settings.streams, **options) as pool:
                    list(pool.map(lambda item: dino.run([item]), prepared))
                return len(tiles)

            def extract(sink: SceneSink = sink) -> int:
                for blocks in job.mosaic().rows([0]):
                    sink.append(blocks)
                return job.plan.shape[1]

            for name, way in (("forward", forward), ("extract", extract)):
                start, used = time.perf_counter(), time.process_time()
                count = way()
                times[name].append(((time.perf_counter() - start) / count, (time.process_time() - used) / count))
    medians = {name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in times.items()}
    wall, cpu = (f / e for f, e in zip(medians["forward"], medians["extract"], strict=True))
    return {"of_forward": wall, "of_forward_cpu": cpu}


def compare(path: Path, contexts: list[int], *, model: str | None, weights: str | None) -> None:
    """Tiles against one piece."""
    dino = dd.load(model, weights=weights, engine="eager")
    for number, context in enumerate(contexts):
        with SceneJob(dino, [path], SceneOptions(context=context)) as job:
            if not number:
                start = time.process_time()
                whole = dino.run([job.reader((0, 0, *job.scene.size))]).patches[0]
                print(f"one piece: {time.process_time() - start:.0f} s of a core")
            tiled, seams, start = torch.zeros_like(whole), SeamCounter(job.plan), time.process_time()
            for blocks in job.mosaic().rows(range(job.plan.shape[0])):
                seams.add(blocks)
                for block in blocks:
                    (i, j), (h, w) = block.origin, block.valid.shape
                    tiled[i : i + h, j : j + w] = torch.from_numpy(block.patches.astype(np.float32))
            cosine = F.cosine_similarity(tiled, whole, dim=-1)
            print(
                f"context {context}: cosine {float(cosine.mean()):.4f} on average, "
                f"5th percentile {float(cosine.flatten().quantile(0.05)):.4f}; steps at borders ÷ elsewhere "
                f"{seams.ratio or 0:.3f}; {time.process_time() - start:.0f} s of a core",
                flush=True,
            )


if __name__ == "__main__":
    main()
