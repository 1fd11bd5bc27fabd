"""Owns token merging at run time: patches that look alike pass most blocks as one, and come out as many again.

After Bolya et al. 2023 (ToMe), for dense output: a patch merges only into one of the four nearest that stay (one of
each 2×2 stays), merged tokens stand at their mean place and count in attention for as many as they are, and in the end
each patch gets back by how much it differed from its group's mean.

Shapes: B images, P prefix tokens, N = h·w patches, M of them left, D embed_dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from densedino.engines.eager import EagerEngine
from densedino.errors import InputError
from densedino.models.rope import rope_angles, rope_coords, rope_periods
from densedino.models.vit import VisionTransformer, block_indices

if TYPE_CHECKING:
    from collections.abc import Sequence

    from densedino.engines.eager import Precision
    from densedino.models.convnext import ConvNeXt
    from densedino.models.layers import Attention, Block

__all__ = ["Groups", "MergedEngine", "group_patches"]

_MOST = 0.75  # one patch of each 2×2 stays


@dataclass(frozen=True)
class Groups:
    """Which patches are one."""

    ids: Tensor
    """[B, N] int64, from 0 to M − 1."""
    sizes: Tensor
    """[B, M] float32: patches of each group."""

    def mean(self, patches: Tensor) -> Tensor:
        """[B, N, D] -> [B, M, D]."""
        sums = patches.new_zeros(*self.sizes.shape, patches.shape[-1])
        return sums.scatter_add_(1, self._index(patches), patches) / self.sizes[..., None]

    def spread(self, groups: Tensor) -> Tensor:
        """[B, M, D] -> [B, N, D], each patch that of its group."""
        return groups.gather(1, self._index(groups))

    def _index(self, like: Tensor) -> Tensor:
        return self.ids[..., None].expand(-1, -1, like.shape[-1])


def group_patches(patches: Tensor, grid: tuple[int, int], *, share: float) -> Groups:
    """Merge the `share` of patches that are most like one of their four nearest in even rows and columns.

    Args:
        patches: [B, N, D].
        grid: (h, w).
        share: of the patches that go; as many as can, if these are fewer.
    """
    (h, w), (B, N, _), device = grid, patches.shape, patches.device
    row, column = torch.arange(N, device=device) // w, torch.arange(N, device=device) % w
    movable = ((row % 2 == 1) | (column % 2 == 1)).nonzero()[:, 0]
    count = min(int(share * N), len(movable))
    offsets = torch.tensor([(0, 0), (0, 2), (2, 0), (2, 2)], device=device)
    rows = (row[movable] // 2 * 2)[:, None] + offsets[:, 0]
    columns = (column[movable] // 2 * 2)[:, None] + offsets[:, 1]
    inside = (rows < h) & (columns < w)
    near = rows.clamp(max=h - 1) * w + columns.clamp(max=w - 1)  # [S, 4]
    unit = F.normalize(patches.float(), dim=-1)
    alike = torch.stack([(unit[:, movable] * unit[:, near[:, k]]).sum(-1) for k in range(4)], dim=-1)
    best, which = alike.masked_fill(~inside, -2.0).max(-1)
    chosen = best.topk(count, dim=1).indices  # [B, count], of the movable ones
    into = near.expand(B, -1, -1).gather(2, which[..., None])[..., 0].gather(1, chosen)
    gone = movable[chosen]
    target = torch.arange(N, device=device).expand(B, N).scatter(1, gone, into)
    stays = torch.ones(B, N, dtype=torch.int64, device=device).scatter(1, gone, 0)
    ids = (stays.cumsum(1) - 1).gather(1, target)
    sizes = torch.zeros(B, N - count, device=device).scatter_add_(1, ids, torch.ones(B, N, device=device))
    return Groups(ids, sizes)


class MergedEngine(EagerEngine):
    """`EagerEngine` with a share of the patches merged after the first quarter of the blocks."""

    def __init__(
        self, model: VisionTransformer | ConvNeXt, *, device: torch.device, precision: Precision, merge: float
    ) -> None:
        """Any ViT.

        Args:
            model: the backbone.
            device: where it runs.
            precision: of matrix products.
            merge: share of the patches that are merged away, up to 0.75.

        Raises:
            InputError: no ViT, or another share.
        """
        if not isinstance(model, VisionTransformer):
            raise InputError(f"merge={merge:g}: tokens are merged in ViTs; {model.spec.name} is none.")
        if not 0 < merge <= _MOST:
            raise InputError(f"merge={merge:g}: give a share of the patches above 0 and up to {_MOST}.")
        super().__init__(model, device=device, precision=precision)
        self.merge = merge

    def _blocks(self, pixels: Tensor, layers: Sequence[int], *, norm: bool) -> Sequence[tuple[Tensor, ...]]:
        model = self._runner
        assert isinstance(model, VisionTransformer)
        wanted = block_indices(layers, model.depth)
        grid, first, start = model.grid_size(pixels), 1 + model.num_register_tokens, model.depth // 4
        tokens = model._embed(pixels, None)
        rope = model.rope_embed(*grid, tokens.device)
        outputs = {}
        for number in range(start):
            tokens = outputs[number] = model.blocks[number](tokens, rope)
        groups = group_patches(tokens[:, first:], grid, share=self.merge)
        means = groups.mean(tokens[:, first:])
        apart = tokens[:, first:] - groups.spread(means)
        tokens = torch.cat([tokens[:, :first], means], dim=1)
        rope = _tables(model, groups.mean(rope_coords(*grid, tokens.device).expand(len(tokens), -1, -1)))
        weight = F.pad(groups.sizes.log(), (first, 0))[:, None, None]
        for number in range(start, max(wanted) + 1):
            tokens = _advance(model.blocks[number], tokens, rope, weight)
            if number in wanted:
                patches = groups.spread(tokens[:, first:]) + apart
                outputs[number] = torch.cat([tokens[:, :first], patches], dim=1)
        found = (model.norm(outputs[number]) if norm else outputs[number] for number in wanted)
        return [(out[:, first:], out[:, 0], out[:, 1:first]) for out in found]


def _tables(model: VisionTransformer, coords: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, 1, P + M, head_dim] of places [B, M, 2]; prefix tokens have angle 0."""
    rope = model.rope_embed
    periods = rope_periods(rope.head_dim, rope.base, coords.device)
    angles = rope_angles(coords.flatten(0, 1), periods).unflatten(0, coords.shape[:2])
    angles = F.pad(angles, (0, 0, rope.num_prefix_tokens, 0))[:, None]
    return angles.cos().tile(2), angles.sin().tile(2)


def _advance(block: Block, x: Tensor, rope: tuple[Tensor, Tensor], weight: Tensor) -> Tensor:
    """[B, P + M, D] -> [B, P + M, D]; `weight` [B, 1, 1, P + M] is added to the scores."""
    x = x + block.ls1(_attend(block.attn, block.norm1(x), rope, weight))
    return x + block.ls2(block.mlp(block.norm2(x)))


def _attend(attn: Attention, x: Tensor, rope: tuple[Tensor, Tensor], weight: Tensor) -> Tensor:
    qkv = attn.qkv(x).unflatten(2, (3, attn.num_heads, attn.head_dim))
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(_rotate(q, rope), _rotate(k, rope), v, attn_mask=weight.to(v.dtype))
    return attn.proj(out.transpose(1, 2).flatten(2))


def _rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = rope
    half = x.shape[-1] // 2
    return (x * cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin).to(x.dtype)
