"""Owns running a ViT on a part of a scene while it sees the rest, shrunk: downsample, then refine.

The whole scene is run once, shrunk; keys and values of each block are kept. A part is then run at full size, at its own
place in the scene's coordinates: its tokens attend to each other, and outside of the part to the shrunk scene's tokens,
each of which counts for as many patches as it covers (the logarithm of that number is added to its scores). CLS and
registers are those of the shrunk scene. At the scene's own size this is exactly the scene in one piece.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from densedino.engines.eager import mixed_bf16
from densedino.errors import InputError
from densedino.models.rope import rope_angles, rope_periods, rotate
from densedino.models.vit import VisionTransformer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from densedino.engines.protocol import Engine

__all__ = ["ContextEngine"]


class ContextEngine:
    """Runs parts of one scene.

    Args:
        engine: whose model is run, by plain PyTorch.
        whole: [1, C, H, W] of the scene, shrunk to whole patches.
        grid: (h, w) of the scene in patches, at full size.
        real: [h, w] of `whole`, how much of each of its patches counts: 1, or 0 where there is nothing.

    Raises:
        InputError: the model is no ViT, is in training mode, or the engine is not PyTorch's.
    """

    def __init__(self, engine: Engine, whole: Tensor, *, grid: tuple[int, int], real: Tensor) -> None:
        if not isinstance(engine.model, VisionTransformer) or engine.name != "eager":
            raise InputError(
                f"context is for ViTs in plain PyTorch; this is {engine.model.spec.name} by engine {engine.name!r}. "
                "Fix: --engine eager, or --context 0 (a ConvNeXt sees only what is near anyway)."
            )
        if engine.model.training:
            raise InputError("the model is in training mode; call dino.model.eval() first.")
        self._model = mixed_bf16(engine.model) if engine.precision == "bf16" else engine.model
        self._device, self._grid = engine.device, grid
        self._prefix = 1 + self._model.num_register_tokens
        self._coarse = (whole.shape[2] // self._model.stride, whole.shape[3] // self._model.stride)
        self._real = real.float().to(self._device)
        self._keys: list[tuple[Tensor, Tensor]] = []
        self._look(whole)

    @torch.no_grad()
    def _look(self, whole: Tensor) -> None:
        tokens = self._model._embed(whole.to(self._device), None)
        rope = self._model.rope_embed(*self._coarse, self._device)
        for block in self._model.blocks:
            q, k, v = self._heads(block, tokens, rope)
            self._keys.append((k, v))
            tokens = self._finish(block, tokens, F.scaled_dot_product_attention(q, k, v))
        self._cls = self._model.norm(tokens[:, 0]).float().cpu()

    @torch.no_grad()
    def __call__(self, pixels: Tensor, places: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """Patches [B, h, w, D] after the final norm, and the whole scene's CLS [B, D], on the CPU.

        Args:
            pixels: [B, C, H, W], parts of one size, of whole patches.
            places: (row, column) in the scene's grid of each part's first patch.
        """
        height, width = (n // self._model.stride for n in pixels.shape[2:])
        parts = [self._part(one, place, (height, width)) for one, place in zip(pixels, places, strict=True)]
        return torch.stack(parts), self._cls.expand(len(parts), -1)

    def _part(self, pixels: Tensor, place: tuple[int, int], size: tuple[int, int]) -> Tensor:
        tokens = self._model.patch_embed(pixels[None].to(self._device)).flatten(2).transpose(1, 2)
        rope, scores = self._tables(place, size), self._scores(place, size)
        for block, (keys, values) in zip(self._model.blocks, self._keys, strict=True):
            q, k, v = self._heads(block, tokens, rope)
            bias = scores.to(q.dtype).expand(1, 1, q.shape[2], -1)
            seen = F.scaled_dot_product_attention(
                q, torch.cat([keys, k], dim=2), torch.cat([values, v], dim=2), attn_mask=bias
            )
            tokens = self._finish(block, tokens, seen)
        return self._model.norm(tokens)[0].float().cpu().unflatten(0, size)

    def _tables(self, place: tuple[int, int], size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """RoPE of a part: its patches' places in the scene's coordinates."""
        axes = [
            (torch.arange(n, dtype=torch.float32) + first + 0.5) / whole * 2.0 - 1.0
            for n, first, whole in zip(size, place, self._grid, strict=True)
        ]
        coords = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1)
        embed = self._model.rope_embed
        angles = rope_angles(coords, rope_periods(embed.head_dim, embed.base)).to(self._device)
        return angles.cos().tile(2), angles.sin()

    def _scores(self, place: tuple[int, int], size: tuple[int, int]) -> Tensor:
        """What is added to the scores of prefix, shrunk scene and part: [1 + R + coarse + part]."""
        inside = []
        for n, first, whole, coarse in zip(size, place, self._grid, self._coarse, strict=True):
            edges = torch.linspace(0, whole, coarse + 1, dtype=torch.float64)
            inside.append((edges[1:].clamp(max=first + n) - edges[:-1].clamp(min=first)).clamp(min=0))
        cell = self._grid[0] * self._grid[1] / (self._coarse[0] * self._coarse[1])
        outside = (cell - inside[0][:, None] * inside[1]).clamp(min=0).float().to(self._device)
        outside = torch.where(outside > 1e-6 * cell, outside * self._real, 0.0)
        zeros = outside.new_zeros(1)
        return torch.cat([zeros.expand(self._prefix), outside.flatten().log(), zeros.expand(size[0] * size[1])])

    def _heads(self, block: Any, tokens: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [B, H, N, d] of a block."""
        attn = block.attn
        qkv = attn.qkv(block.norm1(tokens)).unflatten(2, (3, attn.num_heads, -1))
        q, k = rotate(qkv[:, :, :2], rope).unbind(2)
        return q.transpose(1, 2), k.transpose(1, 2), qkv[:, :, 2].transpose(1, 2)

    def _finish(self, block: Any, tokens: Tensor, seen: Tensor) -> Tensor:
        """The rest of a block after attention [B, H, N, d]."""
        tokens = tokens + block.ls1(block.attn.proj(seen.transpose(1, 2).flatten(2)))
        out: Tensor = tokens + block.ls2(block.mlp(block.norm2(tokens)))
        return out
