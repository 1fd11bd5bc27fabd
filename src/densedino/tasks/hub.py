"""Owns released heads as the reference's hub gives them: one plain module, normalised pixels in, its outputs out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from densedino.engines.eager import EagerEngine
from densedino.errors import InputError
from densedino.heads.catalog import create_head, head_spec
from densedino.heads.dinotxt import DinoTxt
from densedino.heads.mask2former import Masks, Segmentor
from densedino.heads.tapping import backbone_taps
from densedino.models.catalog import create_model
from densedino.tasks.loading import load_headed

if TYPE_CHECKING:
    from densedino.heads.catalog import HeadSpec
    from densedino.models.vit import VisionTransformer

__all__ = ["HubModel", "TextHubModel", "load_module"]


class HubModel(nn.Module):
    """Backbone and head as one module, with gradients.

    Outputs: logits [B, 1000] (lc), depth [B, 1, h, w] in metres (dd, chmv2), a dict of `pred_logits`, `pred_masks` and
    `aux_outputs` (ms), or of a list of images a list of dicts of `scores`, `labels` and `boxes` (de).
    """

    def __init__(
        self, spec: HeadSpec, backbone: VisionTransformer, head: nn.Module, *, autocast_dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.spec = spec
        self.backbone = backbone
        self.head = head
        self.autocast_dtype = autocast_dtype

    def forward(self, x: Any) -> Any:
        """Normalised pixels [B, 3, H, W]; for the detector a list of [3, H, W]."""
        device = next(self.backbone.parameters()).device
        dtype = self.autocast_dtype
        use = dtype not in (None, torch.float32) and device.type == "cuda"
        with torch.autocast(device.type, dtype=dtype, enabled=use):
            return self.head(x, backbone_taps(self.backbone, self.spec.layers))

    def predict(self, x: Tensor, rescale_to: tuple[int, int] = (512, 512)) -> Masks:
        """Of the segmentor alone: its output with `pred_masks` at `rescale_to` (H, W)."""
        if not isinstance(self.head, Segmentor):
            raise InputError(f"{self.spec.hub or self.spec.name} is no segmentor; call the model itself.")
        return self.head.predict(x, backbone_taps(self.backbone, self.spec.layers), size=rescale_to)


class TextHubModel(nn.Module):
    """dino.txt with its backbone."""

    def __init__(self, spec: HeadSpec, backbone: VisionTransformer, head: DinoTxt) -> None:
        super().__init__()
        self.spec = spec
        self.backbone = backbone
        self.head = head

    @property
    def logit_scale(self) -> Tensor:
        """Its logarithm, [1]."""
        return self.head.logit_scale

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        """[B, 3, H, W] to [B, 2 D]."""
        out, _ = self.head.encode_image(image, backbone_taps(self.backbone, self.spec.layers))
        return nn.functional.normalize(out, dim=-1) if normalize else out

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """Numbers of the tokenizer [T, 77] to [T, 2 D]."""
        out = self.head.encode_text(text)
        return nn.functional.normalize(out, dim=-1) if normalize else out

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Both embeddings, normalised, exp(logit_scale), and patch tokens after the vision head [B, N, D]."""
        return self.head(image, text, backbone_taps(self.backbone, self.spec.layers))


def load_module(
    name: str,
    *,
    pretrained: bool = True,
    weights: Any = None,
    backbone_weights: Any = None,
    check_hash: bool = False,
    autocast_dtype: torch.dtype | None = None,
) -> HubModel | TextHubModel:
    """The module of a hub entry point, in eval mode.

    Args:
        name: of the entry point, or of a head.
        pretrained: load weights; without, freshly initialised.
        weights: as `dd.load`; names of releases mean a file in the cache.
        backbone_weights: likewise.
        check_hash: refuse a head whose SHA-256 is not that of the release.
        autocast_dtype: on CUDA.

    Raises:
        As `dd.load`.
    """
    spec = head_spec(name)
    if pretrained:
        headed = load_headed(
            spec,
            weights=_given(weights),
            backbone_weights=_given(backbone_weights),
            device="cpu",
            engine="eager",
            precision="fp32",
        )
        if check_hash and not (spec.sha256 and headed.sha256.startswith(spec.sha256)):
            raise InputError(
                f"check_hash: {headed.source} (SHA-256 {headed.sha256[:8]}…) is not the released {spec.file}."
            )
        assert isinstance(headed.engine, EagerEngine)
        backbone, head = headed.engine.model, headed.head
    else:
        backbone, head = create_model(spec.backbone), create_head(spec)
    vit = cast("VisionTransformer", backbone)
    if isinstance(head, DinoTxt):
        return TextHubModel(spec, vit, head).eval()
    return HubModel(spec, vit, head, autocast_dtype=autocast_dtype).eval()


def _given(weights: Any) -> Any:
    """Paths, URLs and mappings as they are; names of releases (an enum of them, "SYNTHMIX") mean the cached file."""
    value = getattr(weights, "value", weights)
    if isinstance(value, str) and value.replace("_", "").isalnum() and value == value.upper():
        return None
    return value
