"""How many images a second mean IoU and boundary F take: 100,000 pixels, 150 classes, one core, its own time.

    python benchmarks/eval_metrics.py

Three kinds of predictions: nearly right, of large regions; one pixel in ten wrong; noise in every pixel (the worst).
"""

from __future__ import annotations

import os
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from densedino.evals.boundary import boundary_f_of, count_boundaries
from densedino.evals.metrics import count_classes, iou_of


def main() -> None:
    """Print a line for each kind."""
    rng = np.random.default_rng(0)
    shape = (250, 400)
    regions = np.repeat(np.repeat(rng.integers(0, 150, (10, 16)), 25, 0), 25, 1).astype(np.uint8)
    noise = rng.integers(0, 150, shape).astype(np.uint8)
    kinds = {
        "shifted by 2": np.roll(regions, 2, 1),
        "a tenth wrong": np.where(rng.random(shape) < 0.1, noise, regions),
        "noise": noise,
    }
    for name, predicted in kinds.items():
        rates = []
        for _ in range(5):
            start = time.thread_time()
            for _ in range(10):
                counts = count_classes(predicted, regions, num_classes=150, ignore=255)
                counts |= count_boundaries(predicted, regions, num_classes=150, ignore=255)
                iou_of(counts), boundary_f_of(counts)
            rates.append(10 / (time.thread_time() - start))
        print(f"{name:<16}{np.median(rates):7.0f} images/s")


if __name__ == "__main__":
    main()
