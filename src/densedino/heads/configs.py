"""Owns the sizes that a head is built from, one frozen set per kind; the defaults are those of the released heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from densedino.heads.bins import Bins

__all__ = [
    "AdapterConfig",
    "Config",
    "DetectorConfig",
    "DinoTxtConfig",
    "DptConfig",
    "LinearConfig",
    "Mask2FormerConfig",
    "SegmentorConfig",
]


@dataclass(frozen=True, kw_only=True)
class LinearConfig:
    """One linear layer on CLS and the mean patch."""

    classes: int = 1000


@dataclass(frozen=True, kw_only=True)
class DptConfig:
    """The options in which the two released DPT heads differ."""

    reassembled: tuple[int, int, int, int]
    """Widths of the four taps once they are reassembled."""
    width: int
    """Of the fusion blocks."""
    hidden: int
    """Before the logits."""
    bins: Bins
    norms_inputs: bool = False
    """Batch norm on each tap."""
    reads_cls: bool = False
    """CLS is projected into each patch."""
    residual_bias: bool = False
    projects_fused: bool = False
    """A 3x3 convolution with ReLU after the last fusion."""


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """ViT-Adapter without injectors."""

    stem: int = 64
    heads: int = 16
    points: int = 4
    ratio: float = 0.5
    """Of values to tokens, in width."""
    ffn_ratio: float = 0.25


@dataclass(frozen=True, kw_only=True)
class Mask2FormerConfig:
    """Pixel decoder and decoder."""

    dim: int = 2048
    heads: int = 16
    hidden: int = 4096
    encoder_layers: int = 6
    decoder_layers: int = 9
    queries: int = 100
    classes: int = 150


@dataclass(frozen=True, kw_only=True)
class SegmentorConfig:
    """ViT-Adapter and Mask2Former."""

    adapter: AdapterConfig = AdapterConfig()
    mask2former: Mask2FormerConfig = Mask2FormerConfig()


@dataclass(frozen=True, kw_only=True)
class DetectorConfig:
    """Plain-DETR with windows, two stages and boxes refined layer by layer."""

    dim: int = 768
    heads: int = 8
    encoder_layers: int = 6
    encoder_hidden: int = 2048
    decoder_layers: int = 6
    decoder_hidden: int = 2048
    bias_hidden: int = 512
    """Of the MLPs from a box's distance to a bias of attention."""
    queries: int = 1500
    spare_queries: int = 1500
    """Of training, in the file and unused."""
    classes: int = 91
    windows: int = 3
    """Along each side."""
    detections: int = 1500


@dataclass(frozen=True, kw_only=True)
class DinoTxtConfig:
    """A vision head of a few blocks, and a text transformer."""

    vision_blocks: int = 2
    vision_heads: int = 16
    vision_hidden: int = 2752
    text_dim: int = 1280
    text_heads: int = 20
    text_blocks: int = 24
    text_hidden: int = 5120
    context: int = 77
    vocabulary: int = 49408


Config = LinearConfig | DptConfig | SegmentorConfig | DetectorConfig | DinoTxtConfig
