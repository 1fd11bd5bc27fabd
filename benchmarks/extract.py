"""How much of the pure forward throughput `densedino extract` reaches over real JPEG files.

    python benchmarks/extract.py --images ../shared/data/imagenette/train --count 1024

Pure forward: the model alone, on batches that were prepared beforehand and that all lie in memory, run in the way that
is fastest on this machine among those tried: one batch after another with all cores, and one batch per core side by
side. Extraction: the same files through `extract`, from listing the folder to the last commit, with decoding,
normalising, hashing and writing; the time to load the weights is in neither. All are run in turns, so that what else
the machine does hits all; figures are medians. Processor time is printed too: on a machine that others use at the same
time, the ratio of processor times is the steadier figure.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image

import densedino as dd
from densedino.features.extract import extract

if TYPE_CHECKING:
    from collections.abc import Callable


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="a folder of JPEG files; scikit-image's photographs if not given")
    parser.add_argument("--count", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", default=None)
    parser.add_argument("--weights", default=None)
    args = parser.parse_args()
    dino = dd.load(args.model, weights=args.weights)
    print(dino)
    with tempfile.TemporaryDirectory() as folder:
        files = collect(args.images, Path(folder) / "images", count=args.count)
        listing = Path(folder) / "files.txt"
        listing.write_text("\n".join(str(file) for file in files))
        mean = sum(file.stat().st_size for file in files) / len(files)
        print(f"{len(files)} JPEG files of {mean / 1024:.0f} KiB on average, {os.cpu_count()} cores")
        measure(dino, files, listing, Path(folder) / "store", rounds=args.rounds)


def collect(images: Path | None, folder: Path, *, count: int) -> list[Path]:
    """Paths of `count` JPEG files: those in `images`, or cuts of scikit-image's photographs."""
    if images is not None:
        found = sorted(path.resolve() for path in images.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
        step = max(1, len(found) // count)
        return found[::step][:count]
    from skimage import data

    folder.mkdir(parents=True)
    photos = [Image.fromarray(getattr(data, name)()) for name in ("astronaut", "chelsea", "coffee", "rocket")]
    for number, photo in zip(range(count), itertools.cycle(photos), strict=False):
        left, top = (number * 37) % (photo.width - 224), (number * 23) % (photo.height - 224)
        photo.crop((left, top, left + 224, top + 224)).save(folder / f"{number:05d}.jpg", quality=92)
    return sorted(folder.iterdir())


def measure(dino: dd.FeatureExtractor, files: list[Path], listing: Path, store: Path, *, rounds: int) -> None:
    """Print images/s of each way, and the ratio."""
    prepared = [dino.transform(file) for file in files]
    sizes: dict[tuple[int, ...], list[int]] = {}
    for i, one in enumerate(prepared):
        sizes.setdefault(tuple(one.pixels.shape), []).append(i)
    batches = [members[i : i + 8] for members in sizes.values() for i in range(0, len(members), 8)]
    cores = torch.get_num_threads()

    def run(members: list[int]) -> None:
        dino.run([prepared[i] for i in members])

    def forward_all_cores() -> None:
        for members in batches:
            run(members)

    def forward_side_by_side() -> None:
        torch.set_num_threads(1)
        with ThreadPoolExecutor(cores, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            list(pool.map(run, batches))
        torch.set_num_threads(cores)

    def extraction() -> None:
        report = extract(dino, [listing], output=store)
        assert report.rows == len(files), report
        shutil.rmtree(store)

    ways: dict[str, Callable[[], None]] = {
        "forward, all cores": forward_all_cores,
        "forward, a batch per core": forward_side_by_side,
        "extract": extraction,
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    processor: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            start, used = time.perf_counter(), time.process_time()
            way()
            if turn:  # the first warms up
                times[name].append(time.perf_counter() - start)
                processor[name].append(time.process_time() - used)
        if turn:
            print(f"round {turn}: " + ", ".join(f"{name} {len(files) / t[-1]:.1f}/s" for name, t in times.items()))
    for name in ways:
        rate = len(files) / statistics.median(times[name])
        each = statistics.median(processor[name]) / len(files) * 1e3
        print(f"{name:28}{rate:8.1f} images/s{each:8.2f} ms of a core each")
    for name in list(ways)[:2]:
        ratios = [
            statistics.median(f / e for f, e in zip(kind[name], kind["extract"], strict=True))
            for kind in (times, processor)
        ]
        print(f"extract / {name:28} {ratios[0]:.3f} (processor time {ratios[1]:.3f})")


if __name__ == "__main__":
    main()
