"""Owns the pixel probe: an affine map of tokens whose outputs are interpolated to pixels, and its training.

What batch norm and a 1×1 convolution are together, with the norm's statistics taken exactly, over all training tokens.
With cross-entropy the problem is convex, and `ridge` makes its solution the only one: that is what the figure is of,
not of a schedule. Descent goes in whitened coordinates, as directions of features differ ten thousandfold in variance:
otherwise thousands of steps end far from the solution, and a learning rate decides the figure.
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
    import numpy as np
    from numpy.typing import NDArray

    from densedino.evals.tokens import TokenMap

__all__ = ["Fitting", "PixelProbe", "fit_probe", "spread_to_pixels", "standardisation"]

MapOf = Callable[[int], "TokenMap"]
TargetOf = Callable[[int], Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Fitting:
    """How a probe is trained."""

    steps: int = 600
    batch: int = 16
    """Images a step."""
    pixel_stride: int = 8
    """Of every so many rows and columns of pixels one is taken, from a place that is drawn at every step."""
    lr: float = 0.1
    """Adam's, at its peak after a tenth of the steps; then it falls to 0 by a cosine."""
    ridge: float = 1e-4
    """ridge / 2 · |weights|², of standardised channels, is added to the mean loss."""


class PixelProbe:
    """Outputs of each pixel: `x @ weight + bias` of its tokens, interpolated. Weight [D, C], bias [C]."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.weight, self.bias = weight, bias

    def arrays(self) -> dict[str, NDArray[np.float32]]:
        """To be kept: `weight` [D, C] and `bias` [C], of features as they are stored."""
        return {"weight": self.weight.numpy(), "bias": self.bias.numpy()}

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


def standardisation(map_of: MapOf, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [D] and standard deviation [D] of channels over all tokens of `count` images, and their correlations [D, D].

    In float64. A channel that never changes has a deviation of 1.

    Raises:
        InputError: numbers that are not finite.
    """
    dim = map_of(0).array.shape[2]
    origin = map_of(0).float().flatten(0, 1).mean(0)  # sums of squares stay small around it
    number, total, squares = 0, torch.zeros(dim, dtype=torch.float64), torch.zeros(dim, dim, dtype=torch.float64)
    for i in range(count):
        flat = map_of(i).float().flatten(0, 1) - origin
        number += len(flat)
        total += flat.sum(0).double()
        squares += (flat.T @ flat).double()
    mean = total / number
    covariance = squares / number - torch.outer(mean, mean)
    deviation = covariance.diagonal().clamp(min=0).sqrt()
    if not bool(torch.isfinite(deviation).all()):
        raise InputError("features that are not finite: extract them again.")
    mean = mean + origin.double()
    deviation = torch.where(deviation > 1e-4 * (mean.abs() + 1e-12), deviation, torch.ones_like(deviation))
    return mean, deviation, covariance / torch.outer(deviation, deviation)


def _whitening(correlation: Tensor) -> Tensor:
    """A matrix [D, D] after which standardised channels are uncorrelated, of variance 1 (less where there is none)."""
    values, vectors = torch.linalg.eigh(correlation)
    return (vectors * values.clamp(min=1e-4).rsqrt()).float()


def fit_probe(
    map_of: MapOf,
    target_of: TargetOf,
    *,
    count: int,
    outputs: int,
    loss: Loss,
    fitting: Fitting,
    seed: int,
    start: float = 0.0,
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
        start: of the bias; weights start at 0.
    """
    mean, deviation, correlation = standardisation(map_of, count)
    whitening = _whitening(correlation)
    weight = torch.zeros(len(mean), outputs, requires_grad=True)
    bias = torch.full((outputs,), start, requires_grad=True)
    optimizer = torch.optim.Adam([weight, bias], lr=fitting.lr)
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
        standard = whitening @ weight
        scaled = standard * scale[:, None]  # standardises the weights instead of every token
        moved = bias - shift @ scaled
        for members in _alike(map_of, picked):
            maps = [map_of(i) for i in members]
            tokens = torch.stack([one.float() for one in maps])
            down, across = _weights(maps[0])
            step_rows = slice(offsets[0], None, fitting.pixel_stride), slice(offsets[1], None, fitting.pixel_stride)
            found.append(_spread(tokens @ scaled + moved, down[step_rows[0]], across[step_rows[1]]).flatten(0, 2))
            wanted.append(torch.stack([target_of(i)[step_rows[0], step_rows[1]] for i in members]).flatten())
        value = loss(torch.cat(found), torch.cat(wanted)) + fitting.ridge / 2 * standard.square().sum()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    final = whitening @ weight.detach() * scale[:, None]
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
