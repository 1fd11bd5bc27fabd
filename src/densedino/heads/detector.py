"""Owns the detector: Plain-DETR (Lin et al. 2023; public ancestor MIT) on windows of a plain ViT, in two stages.

Global attention with a bias from each box to each place, boxes in pixels, refined from layer to layer.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from densedino.errors import InputError
from densedino.heads.attention import MultiheadAttention, ReluMlp, attend, learned
from densedino.heads.boxes import corners_of, moved
from densedino.heads.positions import sine_features, sine_grid
from densedino.heads.proposals import ProposalMaps, propose
from densedino.heads.windows import windowed_features

if TYPE_CHECKING:
    from collections.abc import Sequence

    from densedino.heads.configs import DetectorConfig
    from densedino.heads.proposals import Proposals
    from densedino.heads.tapping import TokensOf

__all__ = ["Boxes", "Detections", "Detector", "batched"]

_PATCH = 16
_PADDED = -100.0  # added to scores of attention into padding


class Detections(TypedDict):
    """Of one image, best first."""

    scores: Tensor
    """[N], in [0, 1]."""
    labels: Tensor
    """[N] int64, the class."""
    boxes: Tensor
    """[N, 4], (x1, y1, x2, y2) in pixels of the image."""


class Boxes(NamedTuple):
    """Of every query."""

    logits: Tensor
    """[B, Q, classes]."""
    boxes: Tensor
    """[B, Q, 4], (cx, cy, w, h) in pixels."""


class _Scene(NamedTuple):
    """The encoded image."""

    memory: Tensor
    """[B, h * w, D]."""
    position: Tensor
    """[B, h * w, D]."""
    padding: Tensor
    """[B, h, w] bool."""


class _EncoderLayer(nn.Module):
    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        dim = config.dim
        self.self_attn = MultiheadAttention(dim, heads=config.heads)
        self.linear1 = nn.Linear(dim, config.encoder_hidden)
        self.linear2 = nn.Linear(config.encoder_hidden, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)

    def forward(self, x: Tensor, position: Tensor, mask: Tensor) -> Tensor:
        placed = x + position
        x = self.norm1(x + self.self_attn(placed, placed, x, mask=mask))
        return self.norm2(x + self.linear2(F.relu(self.linear1(x))))


class _Encoder(nn.Module):
    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_EncoderLayer(config) for _ in range(config.encoder_layers))

    def forward(self, x: Tensor, position: Tensor, padding: Tensor) -> Tensor:
        mask = ~padding.flatten(1)[:, None, None]
        for layer in self.layers:
            x = layer(x, position, mask)
        return x


def _bias_mlp(config: DetectorConfig) -> nn.Sequential:
    hidden = config.bias_hidden
    return nn.Sequential(nn.Linear(2, hidden), nn.ReLU(), nn.Linear(hidden, config.heads, bias=False))


class _BoxAttention(nn.Module):
    """Attention to every place of the image, with a bias from where the place is to the box's four sides."""

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        dim = config.dim
        self.heads = config.heads
        self.cpb_mlp1 = _bias_mlp(config)
        self.cpb_mlp2 = _bias_mlp(config)
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, queries: Tensor, boxes: Tensor, scene: _Scene) -> Tensor:
        bias = self._bias(boxes, scene.padding) + _PADDED * scene.padding.flatten(1)[:, None, None]
        q, k, v = self.q(queries), self.k(scene.memory + scene.position), self.v(scene.memory)
        return self.proj(attend(q, k, v, heads=self.heads, mask=bias))

    def _bias(self, boxes: Tensor, padding: Tensor) -> Tensor:
        """[B, heads, Q, h * w]."""
        x1, y1, x2, y2 = corners_of(boxes).unbind(-1)
        height, width = padding.shape[1:]
        x = (torch.arange(width, device=boxes.device) + 0.5) * _PATCH
        y = (torch.arange(height, device=boxes.device) + 0.5) * _PATCH
        across = self.cpb_mlp1(torch.stack([x1[..., None] - x, x2[..., None] - x], dim=-1))  # [B, Q, w, heads]
        down = self.cpb_mlp2(torch.stack([y1[..., None] - y, y2[..., None] - y], dim=-1))
        return (down[:, :, :, None] + across[:, :, None]).permute(0, 4, 1, 2, 3).flatten(3)


class _DecoderLayer(nn.Module):
    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        dim = config.dim
        self.cross_attn = _BoxAttention(config)
        self.norm1 = nn.LayerNorm(dim)
        self.self_attn = MultiheadAttention(dim, heads=config.heads)
        self.norm2 = nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, config.decoder_hidden)
        self.linear2 = nn.Linear(config.decoder_hidden, dim)
        self.norm3 = nn.LayerNorm(dim)

    def forward(self, x: Tensor, position: Tensor, boxes: Tensor, scene: _Scene) -> Tensor:
        normed = self.norm2(x)
        placed = normed + position
        x = x + self.self_attn(placed, placed, normed)
        x = x + self.cross_attn(self.norm1(x) + position, boxes, scene)
        return x + self.linear2(F.relu(self.linear1(self.norm3(x))))


class _Decoder(nn.Module):
    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_DecoderLayer(config) for _ in range(config.decoder_layers))
        self.final_layer_norm = nn.LayerNorm(config.dim)


class _Transformer(nn.Module):
    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        dim = config.dim
        self.level_embed = nn.Parameter(torch.zeros(1, dim))
        self.encoder = _Encoder(config)
        self.decoder = _Decoder(config)
        self.enc_output = nn.Linear(dim, dim)
        self.enc_output_norm = nn.LayerNorm(dim)
        self.pos_trans = nn.Linear(2 * dim, 2 * dim)
        self.pos_trans_norm = nn.LayerNorm(2 * dim)
        self.enc_output_proj = ProposalMaps(dim)


class Detector(nn.Module):
    """Images of any sizes to boxes with classes."""

    def __init__(self, dim: int, config: DetectorConfig) -> None:
        super().__init__()
        inner, stages = config.dim, config.decoder_layers + 1
        self.config = config
        self.transformer = _Transformer(config)
        self.class_embed = nn.ModuleList(nn.Linear(inner, config.classes) for _ in range(stages))
        self.bbox_embed = nn.ModuleList(ReluMlp(inner, inner, 4, depth=3) for _ in range(stages))
        self.query_embed = learned(config.queries + config.spare_queries, inner)
        self.input_proj = nn.ModuleList(
            [nn.Sequential(nn.Conv2d(2 * 4 * dim, inner, kernel_size=1), nn.GroupNorm(32, inner))]
        )

    def forward(self, images: Sequence[Tensor], tokens_of: TokensOf) -> list[Detections]:
        """Normalised images [3, H, W], of several sizes, to the best (query, class) pairs of each.

        Raises:
            InputError: images too small for as many proposals as there are queries.
        """
        pixels, padding = batched(images)
        found = self.boxes(pixels, padding, tokens_of)
        return [
            self._detections(logits, boxes, (image.shape[1], image.shape[2]))
            for logits, boxes, image in zip(*found, images, strict=True)
        ]

    def boxes(self, pixels: Tensor, padding: Tensor, tokens_of: TokensOf) -> Boxes:
        """Classes and boxes of every query.

        Args:
            pixels: [B, 3, H, W], normalised, H and W multiples of 16, zero in padding.
            padding: [B, H, W] bool, True at the bottom and right where there is no image.
            tokens_of: of the backbone.
        """
        self._check_size(pixels)
        return self.boxes_from(windowed_features(pixels, tokens_of, windows=self.config.windows), padding)

    def boxes_from(self, features: Tensor, padding: Tensor) -> Boxes:
        """`boxes` from windowed features [B, 8 D, H / 16, W / 16]."""
        transformer = self.transformer
        x = self.input_proj[0](features)
        small = F.interpolate(padding[:, None].float(), size=x.shape[2:])[:, 0].bool()
        places = sine_grid(~small, features=x.shape[1], centred=True) + transformer.level_embed[0, :, None, None]
        position = places.flatten(2).transpose(1, 2)
        memory = transformer.encoder(x.flatten(2).transpose(1, 2), position, small)
        proposals = propose(transformer.enc_output_proj(memory.transpose(1, 2).unflatten(2, x.shape[2:])), small)
        return self._refined(self._first_boxes(proposals), proposals.sizes, _Scene(memory, position, small))

    def _check_size(self, pixels: Tensor) -> None:
        h, w = (side // _PATCH for side in pixels.shape[2:])
        number = 5 * h * w + (h // 2) * (w // 2) + (h // 4) * (w // 4)
        if number < self.config.queries or min(h, w) < 4:
            raise InputError(
                f"{pixels.shape[2]}×{pixels.shape[3]} pixels give {number} proposals, and {self.config.queries} are "
                "needed, on sides of 64 pixels or more. Use a larger image: 272×272 pixels give 1500."
            )

    def _first_boxes(self, proposals: Proposals) -> Tensor:
        """The best proposals by class 0, each moved once: [B, Q, 4]."""
        queries = self.config.queries
        features = self.transformer.enc_output_norm(self.transformer.enc_output(proposals.features))
        boxes = moved(proposals.boxes, self.bbox_embed[-1](features), proposals.sizes)
        best = self.class_embed[-1](features)[..., 0].topk(queries, dim=1).indices
        return boxes.gather(1, best[..., None].expand(-1, -1, 4))

    def _refined(self, boxes: Tensor, sizes: Tensor, scene: _Scene) -> Boxes:
        transformer, queries = self.transformer, self.config.queries
        dim = scene.memory.shape[2]
        numbers = sine_features(boxes * (2 * math.pi), features=dim // 2).flatten(2)
        position = transformer.pos_trans_norm(transformer.pos_trans(numbers))[..., :dim]
        x = self.query_embed.weight[:queries].expand(len(boxes), -1, -1)
        logits = boxes.new_empty(0)
        for layer, classify, move in zip(
            transformer.decoder.layers, self.class_embed[:-1], self.bbox_embed[:-1], strict=True
        ):
            x = layer(x, position, boxes, scene)
            normed = transformer.decoder.final_layer_norm(x)
            logits = classify(normed)
            boxes = moved(boxes, move(normed), sizes)
        return Boxes(logits, boxes)

    def _detections(self, logits: Tensor, boxes: Tensor, size: tuple[int, int]) -> Detections:
        scores = logits.sigmoid().flatten()
        best = scores.topk(min(self.config.detections, len(scores)))
        limit = boxes.new_tensor([size[1], size[0]]).repeat(2)
        corners = corners_of(boxes[best.indices // self.config.classes])
        return {
            "scores": best.values,
            "labels": best.indices % self.config.classes,
            "boxes": corners.clamp(min=0).minimum(limit),
        }


def batched(images: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Images [3, H, W] as one batch, padded at the bottom and right by zeros to whole patches, and where that is."""
    height, width = (max(image.shape[i] for image in images) for i in (1, 2))
    height, width = height + -height % _PATCH, width + -width % _PATCH
    pixels = images[0].new_zeros(len(images), images[0].shape[0], height, width)
    padding = torch.ones(len(images), height, width, dtype=torch.bool, device=pixels.device)
    for i, image in enumerate(images):
        pixels[i, :, : image.shape[1], : image.shape[2]] = image
        padding[i, : image.shape[1], : image.shape[2]] = False
    return pixels, padding
