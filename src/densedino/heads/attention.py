"""Owns parts that several heads have: attention between two sets of tokens, MLPs, tables of learned vectors."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["MultiheadAttention", "ReluMlp", "attend", "learned"]


def attend(q: Tensor, k: Tensor, v: Tensor, *, heads: int, mask: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention of [B, Q, D] to [B, S, D]; `mask` as PyTorch's, spread over [B, heads, Q, S]."""
    q, k, v = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


class MultiheadAttention(nn.Module):
    """`torch.nn.MultiheadAttention` of batches [B, N, D], whose layers are called, so that they can be streamed."""

    def __init__(self, dim: int, *, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Queries [B, Q, D], keys and values [B, S, D] to [B, Q, D].

        Args:
            q: queries.
            k: keys.
            v: values.
            mask: bool, True where a query may look, of a shape that spreads over [B, heads, Q, S].
        """
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        q, k, v = (F.linear(t, w, b) for t, w, b in zip((q, k, v), weights, biases, strict=True))
        return self.out_proj(attend(q, k, v, heads=self.heads, mask=mask))


class ReluMlp(nn.Module):
    """Linear layers with ReLU between them."""

    def __init__(self, dim: int, hidden: int, out: int, *, depth: int) -> None:
        super().__init__()
        sizes = [dim, *[hidden] * (depth - 1), out]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., out]."""
        for number, layer in enumerate(self.layers):
            x = layer(x) if number == len(self.layers) - 1 else F.relu(layer(x))
        return x


def learned(rows: int, dim: int, *, deviation: float = 1.0) -> nn.Embedding:
    """A table of vectors, evenly spread: normal numbers would load PyTorch's compiler when made on the meta device."""
    table = nn.Embedding(rows, dim, _weight=torch.empty(rows, dim))
    nn.init.uniform_(table.weight, -deviation * 3**0.5, deviation * 3**0.5)
    return table
