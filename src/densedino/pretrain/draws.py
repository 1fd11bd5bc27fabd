"""Owns the counted draws of the student's forward passes: stochastic depth by sample, RoPE by step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from densedino.models.catalog import ConvNeXtSpec
from densedino.models.draws import Draws, Kept
from densedino.pretrain.randomness import counted_generator, counted_seed

if TYPE_CHECKING:
    from densedino.models.catalog import ViTSpec
    from densedino.models.rope import RopeAugment

__all__ = ["draw"]


def draw(
    spec: ViTSpec | ConvNeXtSpec,
    *,
    seed: int,
    step: int,
    places: range,
    crops: range,
    drop_path: float = 0.0,
    rope: RopeAugment | None = None,
    device: torch.device | str = "cpu",
) -> Draws:
    """The draws of one forward pass over `crops` of the images at `places`, crop after crop: a batch of C·B samples.

    A sample's draws depend on (seed, step, its crop, its place in the global batch), not on what it shares a batch
    with; those of RoPE on (seed, step, kind of crop). A ConvNeXt's rate rises linearly from 0 at the first block to
    `drop_path` at the last (Liu et al. 2022); a ViT's is the same at all (DINOv3 §3.2).

    Args:
        spec: the architecture.
        seed: of the run.
        step: of the run.
        places: of the images in the global batch.
        crops: numbers of the crops in an image: global ones first, then local ones.
        drop_path: probability that a residual branch is left out.
        rope: random changes of the coordinates; a ConvNeXt has none.
        device: where the tensors go.
    """
    rates = _rates(spec, drop_path)
    kept: tuple[Kept, ...] = ()
    if drop_path > 0:
        keeps = np.concatenate([_uniform(seed, step, crop, places, len(rates)) >= rates for crop in crops])
        samples = [torch.from_numpy(np.flatnonzero(keeps[:, branch])) for branch in range(len(rates))]
        kept = tuple(Kept(s.to(device), 1 / (1 - rate)) for s, rate in zip(samples, rates.tolist(), strict=True))
    warps: tuple[torch.Tensor, ...] = ()
    if rope is not None and not isinstance(spec, ConvNeXtSpec):
        rng = counted_generator("rope", seed=seed, step=step, index=crops.start)
        warps = tuple(rope.draw(rng).to(device) for _ in range(spec.depth if rope.per_block else 1))
    return Draws(kept=kept, warps=warps)


def _rates(spec: ViTSpec | ConvNeXtSpec, drop_path: float) -> np.ndarray:
    if isinstance(spec, ConvNeXtSpec):
        return np.linspace(0, drop_path, sum(spec.depths))
    return np.full(2 * spec.depth, drop_path)


def _uniform(seed: int, step: int, crop: int, places: range, branches: int) -> np.ndarray:
    """[len(places), branches]: the rows of these places in a table that is the same for everybody."""
    bits = np.random.PCG64(counted_seed("drop path", seed=seed, step=step, index=crop))
    bits.advance(places.start * branches)  # one draw for each number
    return np.random.Generator(bits).random((len(places), branches))
