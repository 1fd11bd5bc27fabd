"""Owns the projection head: backbone tokens to unit bottleneck features, and those to logits over prototypes."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from densedino.models.layers import Linear

__all__ = ["ProjectionHead"]


class ProjectionHead(nn.Module):
    """MLP, L2 normalisation, linear layer without bias over prototypes (DINO §3.1, without its weight normalisation).

    Args:
        embed_dim: channels of the tokens.
        hidden_dim: width of the MLP's hidden layers.
        bottleneck_dim: d, what the losses of `densedino.pretrain.prototypes` read.
        num_prototypes: K, rows of `last_layer.weight` [K, d].
        num_layers: linear layers of the MLP, at least 1; GELU between them.
    """

    def __init__(
        self,
        embed_dim: int,
        *,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        num_prototypes: int = 65536,
        num_layers: int = 3,
    ) -> None:
        super().__init__()
        widths = [embed_dim, *[hidden_dim] * (num_layers - 1), bottleneck_dim]
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [Linear(before, after), nn.GELU()]
        self.mlp = nn.Sequential(*layers[:-1])
        self.last_layer = nn.Linear(bottleneck_dim, num_prototypes, bias=False)
        self.init_weights()

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draw all weights anew: truncated normal of deviation 0.02, biases zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [..., embed_dim] → bottleneck features [..., bottleneck_dim] of unit length, fp32."""
        return F.normalize(self.mlp(x).float(), dim=-1)

    def logits(self, features: Tensor) -> Tensor:
        """Bottleneck features [..., bottleneck_dim] → logits [..., num_prototypes], not divided by a temperature."""
        logits: Tensor = self.last_layer(features)
        return logits
