"""Owns the homography protocol: matching under known projections of a plane; HPatches as it is on disk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from densedino.errors import InputError
from densedino.evals.datasets import Dataset, Pair, Sample, sample_of
from densedino.evals.labelled import find_images
from densedino.evals.matching import pck_figures, score_pairs
from densedino.evals.protocol import Protocol

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray


__all__ = ["PROTOCOL", "Settings", "find_homographies", "project"]

_GRID = 16
"""Points in a row and in a column, evenly over the first image."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Thresholds as parts of the target's longer side."""

    thresholds: tuple[float, ...] = (0.05, 0.01, 0.02, 0.1)


def project(homography: NDArray[np.float64], points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Points (x, y) [n, 2] of one image in another one."""
    found = np.concatenate([points, np.ones((len(points), 1))], axis=1) @ homography.T
    projected: NDArray[np.float64] = found[:, :2] / found[:, 2:]
    return projected


def find_homographies(root: Path) -> Dataset:
    """`SEQ/1.ppm` to `SEQ/6.ppm` with `SEQ/H_1_2` to `SEQ/H_1_6`, three rows of three numbers each, for any sequence.

    Raises:
        InputError: no such folder, an image or a matrix that is not there.
    """
    samples: dict[str, Sample] = {}
    pairs: list[Pair] = []
    for matrix in sorted(root.glob("*/H_1_*")):
        images = {path.stem: path for path in find_images(matrix.parent)}
        names = ("1", matrix.name.removeprefix("H_1_"))
        if any(name not in images for name in names):
            raise InputError(f"{str(matrix)!r} needs images 1 and {names[1]} beside it.")
        try:
            homography = np.loadtxt(matrix).reshape(3, 3)
        except ValueError as error:
            raise InputError(f"{str(matrix)!r} is no matrix of 3×3 numbers ({error}).") from error
        both = [sample_of(root, images[name]) for name in names]
        samples.update((sample.key, sample) for sample in both)
        pair = _pair(both, homography)
        pairs += [pair] if pair.source_points else []
    if not pairs:
        raise InputError(f"{str(root)!r} has no SEQUENCE/H_1_2 beside SEQUENCE/1.ppm and SEQUENCE/2.ppm (HPatches).")
    return Dataset(
        root=root, layout="HPatches", kind="pairs", train=(), test=tuple(samples.values()), pairs=tuple(pairs)
    )


def _pair(both: list[Sample], homography: NDArray[np.float64]) -> Pair:
    """A grid of points of the first image, those that are in the second one too."""
    sizes = []
    for sample in both:
        with Image.open(sample.image) as image:
            sizes.append(image.size)
    steps = (np.arange(_GRID) + 0.5) / _GRID
    x, y = np.meshgrid(steps * sizes[0][0], steps * sizes[0][1])
    points = np.stack([x.reshape(-1), y.reshape(-1)], 1)
    there = project(homography, points)
    inside = ((there >= 0) & (there < sizes[1])).all(1)
    return Pair(
        key=f"{both[0].key}:{both[1].key}",
        source=both[0].key,
        target=both[1].key,
        source_points=tuple(map(tuple, points[inside].tolist())),
        target_points=tuple(map(tuple, there[inside].tolist())),
        scale=float(max(sizes[1])),
        group=both[0].image.parent.name,
    )


PROTOCOL = Protocol(
    name="homography",
    find=find_homographies,
    settings=Settings,
    heads=lambda settings: ("nearest patch",),
    evaluate=score_pairs,
    figures=pck_figures,
    rule="16×16 points; their features are interpolated; the target's patch of the largest cosine, its centre.",
    learns=False,
)
