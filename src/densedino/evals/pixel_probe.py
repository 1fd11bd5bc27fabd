"""Owns the pixel probe: an affine map of standardised tokens whose outputs are interpolated to pixels, and its training.

What batch norm and a 1×1 convolution are together, with the norm's statistics taken exactly, over all training tokens.
The problem is convex, so that where training ends depends on little: seeds only draw the order of images and pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from densedino.errors import InputError
from densedino.features.tokens import upsample_tokens

if TYPE_CHECKING:
    from densedino.evals.tokens import TokenMap

__all__ = ["Fitting", "PixelProbe", "fit_probe", "spread_to_pixels", "standardisation"]

MapOf = Callable[[int], "TokenMap"]
TargetOf = Callable[[int], Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Fitting:
    """How a probe is trained."""

    steps: int = 1000
    batch: int = 16
    """Images a step."""
    pixel_stride: int = 8
    """Of every so many rows and columns of pixels one is taken, from a place that is drawn at every step."""
    lr: float = 1e-2
    """AdamW's, at its peak after a tenth of the steps; then it falls to 0 by a cosine."""
    weight_decay: float = 1e-3


class PixelProbe:
    """Outputs of each pixel: `x @ weight + bias` of its tokens, interpolated. Weight [D, C], bias [C]."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.weight, self.bias = weight, bias

    def grid(self, tokens: TokenMap) -> Tensor:
        """Outputs on the grid of tokens: [h, w, C]."""
        return tokens.float() @ self.weight + self.bias

    def __call__(self, tokens: TokenMap, *, rows: slice = slice(None)) -> Tensor:
        """Outputs of the file's pixels, or of some of its rows: [rows, W, C]."""
        return spread_to_pixels(self.grid(tokens), tokens, rows=rows)


def spread_to_pixels(grid: Tensor, tokens: TokenMap, *, rows: slice = slice(None)) -> Tensor:
    """Values on the grid of `tokens` [h, w, C] at the pixels of the file, or of some of its rows: [rows, W, C]."""
    down, across = _weights(tokens)
    return _spread(grid[None], down[rows], across)[0]


def standardisation(map_of: MapOf, count: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel over all tokens of `count` images: [D], [D], in float64.

    A channel that never changes has a deviation of 1.

    Raises:
        InputError: numbers that are not finite.
    """
    first = map_of(0).array.shape[2]
    number, total, squares = 0, torch.zeros(first, dtype=torch.float64), torch.zeros(first, dtype=torch.float64)
    for i in range(count):
        flat = map_of(i).float().flatten(0, 1).double()
        number += len(flat)
        total += flat.sum(0)
        squares += (flat**2).sum(0)
    mean = total / number
    deviation = (squares / number - mean**2).clamp(min=0).sqrt()
    if not bool(torch.isfinite(deviation).all()):
        raise InputError("features that are not finite: extract them again.")
    return mean, torch.where(deviation > 1e-6 * (mean.abs() + 1e-12), deviation, torch.ones_like(deviation))


def fit_probe(
    map_of: MapOf,
    target_of: TargetOf,
    *,
    count: int,
    outputs: int,
    loss: Loss,
    fitting: Fitting,
    seed: int,
) -> PixelProbe:
    """Train a probe on `count` images.

    Args:
        map_of: the tokens of image i.
        target_of: what its pixels are, [H, W], of the file's size.
        count: how many images there are.
        outputs: C.
        loss: of outputs [P, C] and targets [P], all pixels of a step.
        fitting: the schedule.
        seed: of the order of images and pixels.
    """
    mean, deviation = standardisation(map_of, count)
    weight = torch.zeros(len(mean), outputs, requires_grad=True)
    bias = torch.zeros(outputs, requires_grad=True)
    optimizer = torch.optim.AdamW(
        [{"params": [weight]}, {"params": [bias], "weight_decay": 0.0}],
        lr=fitting.lr,
        weight_decay=fitting.weight_decay,
    )
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    shift, scale = mean.float(), (1 / deviation).float()
    for step in range(fitting.steps):
        while len(order) < fitting.batch:
            order += torch.randperm(count, generator=generator).tolist()
        picked, order = order[: fitting.batch], order[fitting.batch :]
        offsets = torch.randint(fitting.pixel_stride, (2,), generator=generator).tolist()
        for group in optimizer.param_groups:
            group["lr"] = fitting.lr * _schedule(step, fitting.steps)
        found, wanted = [], []
        scaled = weight * scale[:, None]  # standardises the weights instead of every token
        moved = bias - shift @ scaled
        for members in _alike(map_of, picked):
            maps = [map_of(i) for i in members]
            tokens = torch.stack([one.float() for one in maps])
            down, across = _weights(maps[0])
            step_rows = slice(offsets[0], None, fitting.pixel_stride), slice(offsets[1], None, fitting.pixel_stride)
            found.append(_spread(tokens @ scaled + moved, down[step_rows[0]], across[step_rows[1]]).flatten(0, 2))
            wanted.append(torch.stack([target_of(i)[step_rows[0], step_rows[1]] for i in members]).flatten())
        value = loss(torch.cat(found), torch.cat(wanted))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    final = weight.detach() * scale[:, None]
    return PixelProbe(final, bias.detach() - shift @ final)


def _schedule(step: int, steps: int) -> float:
    """Of the peak: linear warm-up over a tenth, then a cosine to 0."""
    warm = max(1, steps // 10)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _alike(map_of: MapOf, picked: Sequence[int]) -> list[list[int]]:
    """Images of one size together."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for i in picked:
        one = map_of(i)
        groups.setdefault((one.array.shape, one.source_size, one.input_size), []).append(i)
    return list(groups.values())


def _weights(tokens: TokenMap) -> tuple[Tensor, Tensor]:
    """Interpolation from tokens to the file's pixels, [H, h] and [W, w]."""
    shape, size, seen = tokens.array.shape, tokens.source_size, tokens.input_size
    down = _interpolation(shape[0], size[0], seen[0], tokens.stride)
    return down, _interpolation(shape[1], size[1], seen[1], tokens.stride)


@lru_cache(maxsize=64)
def _interpolation(tokens: int, pixels: int, length: float, stride: float) -> Tensor:
    """What `upsample_tokens` does along one axis, as a matrix [pixels, tokens]."""
    unit = torch.eye(tokens)[None, :, None, :]  # channel i is the token i alone
    return upsample_tokens(unit, (pixels, 1), extent=(length, stride), stride=stride)[0, :, :, 0].T.contiguous()


def _spread(grid: Tensor, down: Tensor, across: Tensor) -> Tensor:
    """[B, h, w, C] to the pixels [B, p, q, C] of the rows of two matrices [p, h], [q, w]."""
    batch, h, w, channels = grid.shape
    rows = (down @ grid.reshape(batch, h, w * channels)).view(batch, len(down), w, channels)
    return across @ rows
