"""Owns multi-scale deformable attention (Zhu et al. 2021, section 4.1) in plain PyTorch: no build, exportable.

Equal to `transformers`' function of that name (Apache-2.0, the oracle of the tests). A ratio of values to queries below
one is ViT-Adapter's addition (Chen et al. 2023).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Sequence

    Shapes = Sequence[tuple[int, int]]

__all__ = ["DeformableAttention", "cell_centres", "sample_levels"]

_SAMPLE_BYTES = 1 << 27  # of sampled values at a time


def cell_centres(shapes: Shapes, *, device: torch.device) -> Tensor:
    """Centres (x, y), in [0, 1], of the cells of grids of `shapes` (h, w), one grid after the other: [S, 2]."""
    grids = []
    for height, width in shapes:
        y = (torch.arange(height, device=device, dtype=torch.float32) + 0.5) / height
        x = (torch.arange(width, device=device, dtype=torch.float32) + 0.5) / width
        y, x = torch.meshgrid(y, x, indexing="ij")
        grids.append(torch.stack([x, y], dim=-1).flatten(0, 1))
    return torch.cat(grids)


def sample_levels(values: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of values at `locations`: bilinear between cell centres, zero outside. [B, Q, heads * d].

    Args:
        values: [B, S, heads, d], the maps of all levels one after the other.
        shapes: (h, w) of each level.
        locations: [B, Q, heads, levels, points, (x, y)], in [0, 1].
        weights: [B, Q, heads, levels, points].
    """
    heads, dim = values.shape[2:]
    queries = locations.shape[1]
    maps = [
        part.permute(0, 2, 3, 1).flatten(0, 1).unflatten(2, shape)
        for part, shape in zip(values.split([h * w for h, w in shapes], dim=1), shapes, strict=True)
    ]
    grids = (2 * locations - 1).transpose(1, 2).flatten(0, 1)  # [B * heads, Q, levels, points, 2]
    shares = weights.transpose(1, 2).flatten(0, 1)
    step = queries
    if not torch.compiler.is_compiling():  # a graph has no size to choose the number of parts by
        per_query = len(values) * heads * dim * locations.shape[4] * values.element_size()
        step = max(1, min(queries, _SAMPLE_BYTES // per_query))
    parts = [
        sum(
            (F.grid_sample(level, grid[:, :, i], align_corners=False) * share[:, None, :, i]).sum(-1)
            for i, level in enumerate(maps)
        )
        for grid, share in zip(grids.split(step, dim=1), shares.split(step, dim=1), strict=True)
    ]
    out = torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]  # [B * heads, d, Q]
    return out.unflatten(0, (-1, heads)).permute(0, 3, 1, 2).flatten(2)


class DeformableAttention(nn.Module):
    """Each query looks at a few points, on every level, around its place."""

    def __init__(self, dim: int, *, heads: int, levels: int, points: int, ratio: float = 1.0) -> None:
        super().__init__()
        inner = int(dim * ratio)
        self.heads, self.levels, self.points = heads, levels, points
        self.sampling_offsets = nn.Linear(dim, heads * levels * points * 2)
        self.attention_weights = nn.Linear(dim, heads * levels * points)
        self.value_proj = nn.Linear(dim, inner)
        self.output_proj = nn.Linear(inner, dim)
        self._look_around()

    @torch.no_grad()
    def _look_around(self) -> None:
        """At first each head looks in a direction of its own, its points further and further, all alike."""
        nn.init.zeros_(self.sampling_offsets.weight)
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        angles = [2 * math.pi * head / self.heads for head in range(self.heads)]
        ring = [(math.cos(a), math.sin(a)) for a in angles]  # plain numbers: what is on meta stays cheap
        steps = [
            [step * x / max(abs(x), abs(y)), step * y / max(abs(x), abs(y))]
            for x, y in ring
            for _ in range(self.levels)
            for step in range(1, self.points + 1)
        ]
        self.sampling_offsets.bias.copy_(torch.tensor(steps).flatten())

    def forward(
        self, query: Tensor, reference: Tensor, values: Tensor, shapes: Shapes, *, padding: Tensor | None = None
    ) -> Tensor:
        """[B, Q, D] -> [B, Q, D].

        Args:
            query: [B, Q, D].
            reference: [B, Q, levels, 2], (x, y) in [0, 1]; or 4: (cx, cy, w, h) of a box to look into.
            values: [B, S, D], the maps of all levels one after the other.
            shapes: (h, w) of each level.
            padding: [B, S] bool, True for values that are none.
        """
        projected = self.value_proj(values)
        if padding is not None:
            projected = projected.masked_fill(padding[..., None], 0.0)
        per_point = (self.heads, self.levels, self.points)
        offsets = self.sampling_offsets(query).unflatten(2, (*per_point, 2))
        weights = self.attention_weights(query).unflatten(2, (self.heads, -1)).softmax(-1).unflatten(3, per_point[1:])
        centres = reference[:, :, None, :, None, :2]
        if reference.shape[-1] == 4:
            step = 0.5 / self.points * reference[:, :, None, :, None, 2:]
        else:
            step = 1 / torch.tensor([(w, h) for h, w in shapes], device=query.device)[None, None, None, :, None]
        split = projected.unflatten(2, (self.heads, -1))
        return self.output_proj(sample_levels(split, shapes, centres + offsets * step, weights))
