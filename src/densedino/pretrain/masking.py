"""Owns the block masks of iBOT: which patches of which global crops the student does not see."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch

from densedino.pretrain.randomness import counted_generator

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

__all__ = ["block_mask", "draw_masks", "masked_counts"]


def draw_masks(
    grid: tuple[int, int],
    *,
    batch_size: int,
    seed: int,
    step: int,
    samples: range | None = None,
    num_crops: int = 2,
    probability: float = 0.5,
    ratio: tuple[float, float] = (0.1, 0.5),
    circular_shift: bool = False,
) -> Tensor:
    """Masks for one step: bool [num_crops, len(samples), h·w], True where the student's patch is masked.

    Exactly floor(probability · num_crops · batch_size) crops of the global batch are masked. The draw depends on the
    run seed, the step and a sample's place in the global batch, not on how the batch is split over processes.

    Args:
        grid: (h, w) in patches.
        batch_size: images in the global batch.
        seed: of the run.
        step: of the run.
        samples: the places in the global batch that are wanted; by default all.
        num_crops: global crops per image.
        probability: share of the crops that are masked.
        ratio: the masked share of a masked crop: an even ladder that ends at the upper number.
        circular_shift: roll each mask by a random offset, so that borders are masked as often as the centre.
    """
    samples = range(batch_size) if samples is None else samples
    patches = grid[0] * grid[1]
    counts = np.zeros(num_crops * batch_size, dtype=np.int64)
    ladder = masked_counts(patches, crops=math.floor(probability * len(counts)), ratio=ratio)
    counts[: len(ladder)] = ladder
    counts = counted_generator("mask counts", seed=seed, step=step).permutation(counts)
    masks = np.zeros((num_crops, len(samples), *grid), dtype=np.bool_)
    for crop in range(num_crops):
        for row, sample in enumerate(samples):
            place = crop * batch_size + sample
            if counts[place]:
                rng = counted_generator("mask", seed=seed, step=step, index=place)
                mask = block_mask(grid, int(counts[place]), rng=rng)
                if circular_shift:
                    mask = np.roll(mask, (rng.integers(grid[0]), rng.integers(grid[1])), axis=(0, 1))
                masks[crop, row] = mask
    return torch.from_numpy(masks.reshape(num_crops, len(samples), patches))


def masked_counts(patches: int, *, crops: int, ratio: tuple[float, float]) -> list[int]:
    """How many of `patches` are masked in each of `crops` masked crops: an even ladder over (lower, upper]."""
    low, high = ratio
    # Rounded before the floor, so that 0.3 · 100 patches are 30 whatever the last bit of the product is.
    return [math.floor(round(patches * (low + (high - low) * (i + 1) / crops), 6)) for i in range(crops)]


def block_mask(
    grid: tuple[int, int],
    count: int,
    *,
    rng: np.random.Generator,
    smallest: int = 4,
    aspect: float = 0.3,
    tries: int = 10,
) -> NDArray[np.bool_]:
    """A mask [h, w] with exactly `count` patches masked, in rectangular blocks where possible (BEiT, algorithm 1).

    Blocks of `smallest` patches up to half the grid, with an aspect ratio between `aspect` and 1/`aspect`
    (log-uniform), are laid, overlapping or not, until none fits in `tries` tries; single patches make up the rest.
    """
    h, w = grid
    mask = np.zeros(grid, dtype=np.bool_)
    missing = count
    while missing >= smallest:
        for _ in range(tries):
            area = rng.uniform(smallest, min(missing, max(smallest, h * w / 2)))
            shape = math.exp(rng.uniform(math.log(aspect), -math.log(aspect)))
            rows, columns = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
            if not (0 < rows <= h and 0 < columns <= w):
                continue
            top, left = rng.integers(h - rows + 1), rng.integers(w - columns + 1)
            block = mask[top : top + rows, left : left + columns]
            new = block.size - int(np.count_nonzero(block))
            if 0 < new <= missing:
                block[:] = True
                missing -= new
                break
        else:
            break
    free = np.flatnonzero(~mask)
    mask.flat[rng.choice(free, missing, replace=False)] = True
    return mask
