"""Owns Mask2Former's decoder (Cheng et al. 2022, section 3.2.1) and the segmentor made of it and a ViT-Adapter.

The decoder's twin in `transformers` (Apache-2.0) is the oracle of the tests.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from densedino.heads.attention import MultiheadAttention, ReluMlp, learned
from densedino.heads.pixel_decoder import PixelDecoder, map_positions
from densedino.heads.vit_adapter import ViTAdapter

if TYPE_CHECKING:
    from densedino.heads.configs import Mask2FormerConfig, SegmentorConfig
    from densedino.heads.pixel_decoder import PixelFeatures
    from densedino.heads.tapping import TokensOf
    from densedino.heads.vit_adapter import Pyramid

__all__ = ["Mask2Former", "Masks", "Segmentor", "semantic_map"]


class Prediction(TypedDict):
    """Of one state of the queries."""

    pred_logits: Tensor
    """[B, Q, classes + 1]; the last one is no object."""
    pred_masks: Tensor
    """[B, Q, H / 4, W / 4], logits."""


class Masks(Prediction):
    """Of the last state, and of those before it."""

    aux_outputs: list[Prediction]


class _SelfAttention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.self_attn = MultiheadAttention(dim, heads=heads)
        self.norm = nn.LayerNorm(dim)

    def forward(self, queries: Tensor, position: Tensor) -> Tensor:
        placed = queries + position
        return self.norm(queries + self.self_attn(placed, placed, queries))


class _CrossAttention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.multihead_attn = MultiheadAttention(dim, heads=heads)
        self.norm = nn.LayerNorm(dim)

    def forward(self, queries: Tensor, position: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        return self.norm(queries + self.multihead_attn(queries + position, keys, values, mask=mask))


class _Ffn(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(dim, hidden)
        self.linear2 = nn.Linear(hidden, dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, queries: Tensor) -> Tensor:
        return self.norm(queries + self.linear2(F.relu(self.linear1(queries))))


class _Predictor(nn.Module):
    """Queries that look, in turn at three scales, only where their own mask is."""

    def __init__(self, config: Mask2FormerConfig) -> None:
        super().__init__()
        dim, layers = config.dim, range(config.decoder_layers)
        self.transformer_self_attention_layers = nn.ModuleList(_SelfAttention(dim, config.heads) for _ in layers)
        self.transformer_cross_attention_layers = nn.ModuleList(_CrossAttention(dim, config.heads) for _ in layers)
        self.transformer_ffn_layers = nn.ModuleList(_Ffn(dim, config.hidden) for _ in layers)
        self.post_norm = nn.LayerNorm(dim)
        self.query_feat = learned(config.queries, dim)
        self.query_embed = learned(config.queries, dim)
        self.level_embed = learned(3, dim)
        self.class_embed = nn.Linear(dim, config.classes + 1)
        self.mask_embed = ReluMlp(dim, dim, dim, depth=3)

    def forward(self, pixels: PixelFeatures) -> list[Prediction]:
        """A prediction before the first layer and one after each."""
        B = len(pixels.features)
        values = [
            (m + level[:, None, None]).flatten(2).transpose(1, 2)
            for m, level in zip(pixels.memory, self.level_embed.weight, strict=True)
        ]
        keys = [v + map_positions(m).flatten(2).transpose(1, 2) for v, m in zip(values, pixels.memory, strict=True)]
        queries = self.query_feat.weight.expand(B, -1, -1)
        position = self.query_embed.weight.expand(B, -1, -1)
        predictions = [self._predict(queries, pixels.features)]
        layers = zip(
            self.transformer_cross_attention_layers,
            self.transformer_self_attention_layers,
            self.transformer_ffn_layers,
            strict=True,
        )
        for number, (cross, own, ffn) in enumerate(layers):
            level = number % 3
            mask = _visible(predictions[-1]["pred_masks"], pixels.memory[level])
            queries = ffn(own(cross(queries, position, keys[level], values[level], mask), position))
            predictions.append(self._predict(queries, pixels.features))
        return predictions

    def _predict(self, queries: Tensor, features: Tensor) -> Prediction:
        normed = self.post_norm(queries)
        masks = torch.einsum("bqd,bdhw->bqhw", self.mask_embed(normed), features)
        return {"pred_logits": self.class_embed(normed), "pred_masks": masks}


def _visible(masks: Tensor, level: Tensor) -> Tensor:
    """Where a query may look at a level: its mask, or everywhere if that is empty. Bool [B, 1, Q, h * w]."""
    resized = F.interpolate(masks.detach(), size=level.shape[2:], mode="bilinear").flatten(2)
    inside = resized.sigmoid() >= 0.5
    return (inside | ~inside.any(dim=-1, keepdim=True))[:, None]


class Mask2Former(nn.Module):
    """A pyramid of maps to a set of classes with masks."""

    def __init__(self, dim: int, config: Mask2FormerConfig) -> None:
        super().__init__()
        self.pixel_decoder = PixelDecoder(dim, config)
        self.predictor = _Predictor(config)

    def forward(self, pyramid: Pyramid) -> Masks:
        """Maps [B, dim, h, w] at strides 4, 8, 16, 32."""
        *earlier, last = self.predictor(self.pixel_decoder(pyramid))
        return {"pred_logits": last["pred_logits"], "pred_masks": last["pred_masks"], "aux_outputs": earlier}


class Segmentor(nn.Module):
    """ViT-Adapter and Mask2Former, under the names of the released file."""

    def __init__(self, dim: int, config: SegmentorConfig) -> None:
        super().__init__()
        self.segmentation_model = nn.ModuleList([ViTAdapter(dim, config.adapter), Mask2Former(dim, config.mask2former)])

    def forward(self, image: Tensor, tokens_of: TokensOf) -> Masks:
        """Normalised pixels [B, 3, H, W], multiples of 32, to classes and masks."""
        adapter, decoder = self.segmentation_model
        return decoder(adapter(image, tokens_of(image)))

    def predict(self, image: Tensor, tokens_of: TokensOf, *, size: tuple[int, int]) -> Masks:
        """`forward`, with `pred_masks` at `size` (H, W)."""
        out = self(image, tokens_of)
        masks = F.interpolate(out["pred_masks"], size=size, mode="bilinear")
        return {"pred_logits": out["pred_logits"], "pred_masks": masks, "aux_outputs": out["aux_outputs"]}


def semantic_map(logits: Tensor, masks: Tensor) -> Tensor:
    """How much each class is at each pixel, [B, classes, H, W]: masks weighed by the classes of their queries.

    Args:
        logits: [B, Q, classes + 1].
        masks: [B, Q, H, W], logits at the wanted size.
    """
    return torch.einsum("bqc,bqhw->bchw", logits.softmax(-1)[..., :-1], masks.sigmoid())
