"""Owns the heads that are trained here: from tokens of chosen blocks to logits of classes or of bins of depth.

Every head takes taps (`densedino.heads.tapping.Tap`: patches [B, h, w, D], cls [B, D]), and the pixels where it
`needs_pixels`, and gives logits [B, K, h', w']; those of a whole image are 1×1. Which there are stands in `HEADS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from densedino.errors import InputError, UnknownNameError
from densedino.heads.tapping import maps_of
from densedino.models.vit import block_indices

if TYPE_CHECKING:
    from densedino.heads.tapping import Tap
    from densedino.models.convnext import ConvNeXt
    from densedino.models.vit import VisionTransformer

__all__ = ["HEADS", "HeadConfig", "KnnHead", "LinearHead", "Purpose", "build_head", "head_layers", "needs_pixels"]

Kind = Literal["linear", "bn-linear", "mlp", "knn", "fpn", "upernet", "dpt", "mask-transformer", "vit-adapter"]
_ONE_TAP = frozenset({"linear", "bn-linear", "mlp", "knn", "mask-transformer"})


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """Which head, on which blocks."""

    kind: Kind = "bn-linear"
    layers: tuple[int, ...] = ()
    """Blocks, negative ones from the end. (): the last one, or four evenly spread where a head takes four. Linear heads
    and the MLP join several on channels."""
    width: int = 128
    """Channels inside, where a head has a choice."""
    dropout: float = 0.0
    """Of whole channels, in training, of linear heads (DINOv2 and DINOv3 probe with 0.1 on large data)."""
    neighbours: int = 20
    """Votes of the k-NN head."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise UnknownNameError("head", self.kind, get_args(Kind))
        if self.width < 8 or self.width % 8 or not 0 <= self.dropout < 1 or self.neighbours < 1:
            raise InputError(
                f"width {self.width}, dropout {self.dropout}, neighbours {self.neighbours}: width must be a "
                "multiple of 8, dropout in [0, 1), neighbours at least 1."
            )


@dataclass(frozen=True, kw_only=True)
class Purpose:
    """What a head is to tell."""

    out: int
    """K: classes, or bins of depth."""
    whole: bool = False
    """Of the image as a whole, not of each place."""


def head_layers(config: HeadConfig, depth: int) -> tuple[int, ...]:
    """The blocks that a head taps in a backbone of that depth, counted from 0.

    Raises:
        InputError: an index that is no block, or four are needed and others given.
    """
    if config.layers:
        layers = tuple(block_indices(config.layers, depth))
    elif config.kind in _ONE_TAP:
        layers = (depth - 1,)
    else:
        layers = tuple((depth * (i + 1)) // 4 - 1 for i in range(4)) if depth >= 4 else (depth - 1,) * 4
    if config.kind not in _ONE_TAP and len(layers) != 4:
        raise InputError(f"head {config.kind!r} takes four blocks; layers={config.layers} are {len(layers)}.")
    if config.kind in ("knn", "mask-transformer") and len(layers) != 1:
        raise InputError(f"head {config.kind!r} takes one block; layers={config.layers} are {len(layers)}.")
    return layers


def joined(taps: Sequence[Tap]) -> Tensor:
    """Maps of all taps, at the size of the first, on channels: [B, ΣD, h, w]."""
    first, *others = maps_of(taps)
    return torch.cat([first, *(F.interpolate(m, size=first.shape[2:], mode="bilinear") for m in others)], dim=1)


def pooled(taps: Sequence[Tap]) -> Tensor:
    """CLS and the mean patch of each tap, on channels: [B, Σ2D, 1, 1], as the papers probe whole images."""
    parts = [part for tap in taps for part in (tap.cls, tap.patches.mean(dim=(1, 2)))]
    return torch.cat(parts, dim=-1)[..., None, None]


class LinearHead(nn.Module):
    """Batch norm (maybe), a hidden layer (maybe), and a linear map of each place, or of the whole image."""

    def __init__(
        self, dim: int, *, out: int, whole: bool = False, norm: bool = True, hidden: int = 0, dropout: float = 0.0
    ) -> None:
        """`dim` is of all taps together, for a whole image that of CLS and mean patch."""
        super().__init__()
        self.whole = whole
        self.dropout = nn.Dropout2d(dropout)
        self.batchnorm_layer = nn.BatchNorm2d(dim) if norm else nn.Identity()
        self.hidden = nn.Sequential(nn.Conv2d(dim, hidden, 1), nn.GELU()) if hidden else nn.Identity()
        self.conv = nn.Conv2d(hidden or dim, out, kernel_size=1)
        nn.init.normal_(self.conv.weight, std=0.01)
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]

    def forward(self, taps: Sequence[Tap], pixels: Tensor | None = None) -> Tensor:
        """Logits [B, out, h, w], or [B, out, 1, 1]."""
        x = pooled(taps) if self.whole else joined(taps)
        return self.conv(self.hidden(self.batchnorm_layer(self.dropout(x))))


class KnnHead(nn.Module):
    """A vote of the nearest labelled tokens by cosine, each weighing exp(cosine / 0.07) (DINO, arXiv:2104.14294)."""

    def __init__(self, dim: int, *, out: int, whole: bool, neighbours: int, entries: int = 0) -> None:
        super().__init__()
        self.whole, self.neighbours, self.classes = whole, neighbours, out
        self.bank = nn.Buffer(torch.zeros(entries, dim))
        self.labels = nn.Buffer(torch.zeros(entries, dtype=torch.int64))

    def fill(self, tokens: Tensor, labels: Tensor) -> None:
        """Take labelled tokens [m, D], [m]: all that there is to training.

        Raises:
            InputError: there is none.
        """
        if not len(tokens):
            raise InputError("a k-NN head needs labelled tokens, and there is none.")
        self.bank, self.labels = nn.Buffer(F.normalize(tokens.float(), dim=-1)), nn.Buffer(labels.long())

    def forward(self, taps: Sequence[Tap], pixels: Tensor | None = None) -> Tensor:
        """Logarithms of the shares of votes: [B, out, h, w]."""
        x = (pooled(taps) if self.whole else joined(taps)).permute(0, 2, 3, 1)
        cosines = F.normalize(x, dim=-1) @ self.bank.T
        best, places = cosines.topk(min(self.neighbours, len(self.bank)), dim=-1)
        weights = ((best - best[..., :1]) / 0.07).exp()
        votes = torch.zeros(*x.shape[:3], self.classes, device=x.device).scatter_add(-1, self.labels[places], weights)
        return (votes / votes.sum(-1, keepdim=True)).clamp(min=1e-6).log().permute(0, 3, 1, 2)


def needs_pixels(head: nn.Module) -> bool:
    """Whether a head looks at the image too, so that stored features alone do not do."""
    return bool(getattr(head, "needs_pixels", False))


Builder = Callable[[HeadConfig, Sequence[int], Purpose, int], nn.Module]
"""Of the configuration, the taps' widths, the purpose, and the backbone's stride."""


def _linear(config: HeadConfig, dims: Sequence[int], purpose: Purpose, stride: int) -> nn.Module:
    return LinearHead(
        sum(dims) * (2 if purpose.whole else 1),
        out=purpose.out,
        whole=purpose.whole,
        norm=config.kind != "linear",
        hidden=config.width if config.kind == "mlp" else 0,
        dropout=config.dropout,
    )


def _knn(config: HeadConfig, dims: Sequence[int], purpose: Purpose, stride: int) -> nn.Module:
    dim = sum(dims) * (2 if purpose.whole else 1)
    return KnnHead(dim, out=purpose.out, whole=purpose.whole, neighbours=config.neighbours)


def _pyramid(config: HeadConfig, dims: Sequence[int], purpose: Purpose, stride: int) -> nn.Module:
    from densedino.adapters.pyramid import PyramidHead

    pools = config.kind == "upernet"
    return PyramidHead(dims, width=config.width, out=purpose.out, pools=pools, natural=stride == 32)


def _dpt(config: HeadConfig, dims: Sequence[int], purpose: Purpose, stride: int) -> nn.Module:
    from densedino.adapters.pyramid import DptHead

    return DptHead(dims[0], width=config.width, out=purpose.out)


def _vit_adapter(config: HeadConfig, dims: Sequence[int], purpose: Purpose, stride: int) -> nn.Module:
    from densedino.adapters.pyramid import AdapterHead

    return AdapterHead(dims[0], width=config.width, out=purpose.out)


def _mask_transformer(config: HeadConfig, dims: Sequence[int], purpose: Purpose, stride: int) -> nn.Module:
    from densedino.adapters.mask_transformer import MaskTransformer

    return MaskTransformer(dims[0], out=purpose.out, scale=2 if stride == 16 else 3)


HEADS: dict[str, Builder] = {
    "linear": _linear,
    "bn-linear": _linear,
    "mlp": _linear,
    "knn": _knn,
    "fpn": _pyramid,
    "upernet": _pyramid,
    "dpt": _dpt,
    "mask-transformer": _mask_transformer,
    "vit-adapter": _vit_adapter,
}
_OF_WHOLE_IMAGES = ("linear", "bn-linear", "mlp", "knn")
_OF_VITS = ("dpt", "vit-adapter")


def build_head(
    config: HeadConfig, model: VisionTransformer | ConvNeXt, purpose: Purpose, *, seed: int = 0
) -> nn.Module:
    """A head for this backbone with its initial weights, which depend on `seed` alone.

    Raises:
        InputError: this head cannot tell that, or not on this backbone.
    """
    layers = head_layers(config, model.depth)
    if purpose.whole and config.kind not in _OF_WHOLE_IMAGES:
        valid = ", ".join(_OF_WHOLE_IMAGES)
        raise InputError(f"head {config.kind!r} tells what is where, not what an image is; for that take {valid}.")
    if config.kind in _OF_VITS and model.stride != 16:
        raise InputError(f"head {config.kind!r} is for ViTs; for {model.spec.name} take fpn or upernet.")
    widths = getattr(model, "embed_dims", [model.embed_dim] * model.depth)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return HEADS[config.kind](config, [widths[i] for i in layers], purpose, model.stride)
