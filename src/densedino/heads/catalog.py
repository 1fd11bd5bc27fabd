"""Owns the one table of heads: which backbone, which of its blocks, the sizes, the file, the licence, the statistics.

Sizes and file names are facts about the release. No torch is imported until a head is built.
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from densedino.errors import UnknownNameError
from densedino.heads.bins import Bins
from densedino.heads.configs import (
    AdapterConfig,
    Config,
    DetectorConfig,
    DinoTxtConfig,
    DptConfig,
    LinearConfig,
    Mask2FormerConfig,
    SegmentorConfig,
)
from densedino.models.catalog import MODELS

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["HEADS", "HeadSpec", "create_head", "head_spec", "list_heads"]

Task = Literal["classify", "depth", "segment", "detect", "text"]


@dataclass(frozen=True, kw_only=True)
class HeadSpec:
    """One head for one backbone."""

    name: str
    """`<backbone>-<what it was trained on>-<kind>`: what `dd.load` takes."""
    task: Task
    backbone: str
    """Row of the architecture table."""
    data: str
    """Of the backbone's weights: lvd1689m or sat493m; "" for any."""
    layers: tuple[int, ...]
    """Blocks that it taps, 0 the first."""
    config: Config
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    backbone_prefix: str
    """Of the backbone's tensors in a joint file."""
    head_prefix: str = ""
    """Of the head's in a joint file; a file of the head alone has none."""
    hub: str = ""
    """The reference's entry point."""
    folder: str = ""
    """Of the release."""
    file: str = ""
    sha256: str = ""
    """Leading hex digits, as many as are published."""
    licence: str = "DINOv3 License"
    licence_url: str = "https://ai.meta.com/resources/models-and-libraries/dinov3-license/"

    @property
    def dim(self) -> int:
        """Width of the backbone's tokens."""
        return MODELS[self.backbone].embed_dim

    @property
    def backbone_weights(self) -> str:
        """Name of the weights that it was trained on, or of the architecture where any will do."""
        return f"{self.backbone}-{self.data}" if self.data else self.backbone


_SYNTHMIX = DptConfig(
    reassembled=(2048, 2048, 2048, 2048),
    width=512,
    hidden=32,
    bins=Bins(most=100.0),
    norms_inputs=True,
    projects_fused=True,
)
_CHMV2 = DptConfig(
    reassembled=(128, 256, 512, 1024),
    width=256,
    hidden=128,
    bins=Bins(most=96.0, spacing="mixlog"),
    reads_cls=True,
    residual_bias=True,
)
_EVEN = (9, 19, 29, 39)
_PREFIXES = {  # (of the backbone, of the head) in a file that holds both
    "classify": ("backbone.", "linear_head."),
    "depth": ("encoder.backbone.", "decoder."),
    "segment": ("segmentation_model.0.backbone.", ""),
    "detect": ("backbone.0._backbone.backbone.", ""),
    "text": ("visual_model.backbone.", ""),
}


def _meta(name: str, task: Task, *, hub: str, file: str, layers: tuple[int, ...], config: Config) -> HeadSpec:
    backbone = name.partition("-")[0]
    canopy = "chmv2" in name
    return HeadSpec(
        name=name,
        task=task,
        backbone=backbone,
        data="sat493m" if canopy else "lvd1689m",
        layers=layers,
        config=config,
        # The red mean of the canopy heights is not that of the backbone's own statistics.
        mean=(0.420, 0.411, 0.296) if canopy else (0.485, 0.456, 0.406),
        std=(0.213, 0.156, 0.143) if canopy else (0.229, 0.224, 0.225),
        backbone_prefix=_PREFIXES[task][0],
        head_prefix=_PREFIXES[task][1],
        hub=hub,
        folder="chmv2" if canopy else f"dinov3_{backbone}",
        file=f"{file}.pth",
        sha256=file.rpartition("-")[2],
    )


def _debug(kind: str, task: Task, config: Config, *, layers: tuple[int, ...]) -> HeadSpec:
    return HeadSpec(
        name=f"debug_vit-{kind}",
        task=task,
        backbone="debug_vit",
        data="",
        layers=layers,
        config=config,
        backbone_prefix=_PREFIXES[task][0],
        head_prefix=_PREFIXES[task][1],
        licence="Apache-2.0",
        licence_url="https://www.apache.org/licenses/LICENSE-2.0",
    )


_SPECS: tuple[HeadSpec, ...] = (
    _meta(
        "vit7b16-imagenet1k-linear",
        "classify",
        hub="dinov3_vit7b16_lc",
        file="dinov3_vit7b16_imagenet1k_linear_head-90d8ed92",
        layers=(39,),
        config=LinearConfig(),
    ),
    _meta(
        "vit7b16-synthmix-dpt",
        "depth",
        hub="dinov3_vit7b16_dd",
        file="dinov3_vit7b16_synthmix_dpt_head-02040be1",
        layers=_EVEN,
        config=_SYNTHMIX,
    ),
    _meta(
        "vit7b16-ade20k-m2f",
        "segment",
        hub="dinov3_vit7b16_ms",
        file="dinov3_vit7b16_ade20k_m2f_head-bf307cb1",
        layers=_EVEN,
        config=SegmentorConfig(),
    ),
    _meta(
        "vit7b16-coco2017-detr",
        "detect",
        hub="dinov3_vit7b16_de",
        file="dinov3_vit7b16_coco2017_detr_head-b0235ff7",
        layers=_EVEN,
        config=DetectorConfig(),
    ),
    _meta(
        "vitl16-chmv2-dpt",
        "depth",
        hub="dinov3_vitl16_chmv2",
        file="dinov3_vitl16_chmv2_dpt_head-3703d643",
        layers=(5, 11, 17, 23),
        config=_CHMV2,
    ),
    _meta(
        "vitl16-dinotxt",
        "text",
        hub="dinov3_vitl16_dinotxt_tet1280d20h24l",
        file="dinov3_vitl16_dinotxt_vision_head_and_text_encoder-a442d8f5",
        layers=(23,),
        config=DinoTxtConfig(),
    ),
    # Tiny ones with every branch of the real ones, so that the whole way runs in a test.
    _debug("lc", "classify", LinearConfig(classes=7), layers=(1,)),
    _debug(
        "dpt",
        "depth",
        DptConfig(
            reassembled=(8, 8, 8, 8),
            width=16,
            hidden=8,
            bins=Bins(number=16, most=10.0),
            norms_inputs=True,
            projects_fused=True,
        ),
        layers=(0, 0, 1, 1),
    ),
    _debug(
        "chm",
        "depth",
        DptConfig(
            reassembled=(4, 8, 12, 16),
            width=16,
            hidden=8,
            bins=Bins(number=16, most=96.0, spacing="mixlog"),
            reads_cls=True,
            residual_bias=True,
        ),
        layers=(0, 0, 1, 1),
    ),
    _debug(
        "m2f",
        "segment",
        SegmentorConfig(
            adapter=AdapterConfig(stem=8, heads=4),
            mask2former=Mask2FormerConfig(
                dim=32, heads=4, hidden=48, encoder_layers=1, decoder_layers=3, queries=6, classes=5
            ),
        ),
        layers=(0, 0, 1, 1),
    ),
    _debug(
        "detr",
        "detect",
        DetectorConfig(
            dim=32,
            heads=4,
            encoder_layers=1,
            encoder_hidden=48,
            decoder_layers=2,
            decoder_hidden=48,
            bias_hidden=16,
            queries=12,
            spare_queries=4,
            classes=6,
            windows=2,
            detections=20,
        ),
        layers=(0, 0, 1, 1),
    ),
    _debug(
        "txt",
        "text",
        DinoTxtConfig(vision_heads=2, vision_hidden=64, text_dim=48, text_heads=3, text_blocks=2, text_hidden=96),
        layers=(1,),
    ),
)

HEADS: dict[str, HeadSpec] = {spec.name: spec for spec in _SPECS}


def list_heads(pattern: str = "*") -> list[str]:
    """Names of all heads that match a shell-style `pattern`, in the table's order."""
    return [name for name in HEADS if fnmatch.fnmatch(name, pattern)]


def head_spec(name: str) -> HeadSpec:
    """The table's row for `name`, which may be the reference's entry point too.

    Raises:
        UnknownNameError: no such head; the message names the nearest.
    """
    by_hub = {spec.hub: spec for spec in HEADS.values() if spec.hub}
    if name not in HEADS and name not in by_hub:
        raise UnknownNameError("head", name, HEADS)
    return HEADS.get(name) or by_hub[name]


def create_head(spec: HeadSpec | str, *, device: torch.device | str = "cpu") -> nn.Module:
    """Build a head with PyTorch's own initialisation, in eval mode; "meta" builds shapes only, without memory.

    Raises:
        UnknownNameError: no such head.
    """
    import torch

    row = head_spec(spec) if isinstance(spec, str) else spec
    dim, config = row.dim, row.config
    with torch.device(device):
        return _build(dim, config).eval()


def _build(dim: int, config: Config) -> nn.Module:
    match config:
        case LinearConfig():
            from densedino.heads.linear import LinearClassifier

            return LinearClassifier(dim, classes=config.classes)
        case DptConfig():
            from densedino.heads.dpt import Dpt

            return Dpt(dim, config)
        case SegmentorConfig():
            from densedino.heads.mask2former import Segmentor

            return Segmentor(dim, config)
        case DetectorConfig():
            from densedino.heads.detector import Detector

            return Detector(dim, config)
        case DinoTxtConfig():
            from densedino.heads.dinotxt import DinoTxt

            return DinoTxt(dim, config)
