"""Owns the way from tokens and numbers to colours: the foreground-aware PCA basis and the heat scale."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from densedino.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["PcaBasis", "fit_pca", "heat_colours", "otsu_threshold"]

_SEED = 0  # of the randomised PCA: the same tokens give the same basis, call after call


@dataclass(frozen=True, kw_only=True)
class PcaBasis:
    """An affine map from tokens to one foreground score and three (or as many as asked) whitened components.

    It is linear, so it commutes with any interpolation between tokens: projecting first and resizing four
    channels gives the same picture as resizing the tokens.
    """

    weight: Tensor
    """[D, 1 + k]; column 0 is the foreground axis, the others are the components in units of their deviation."""
    bias: Tensor
    """[1 + k]."""

    def project(self, tokens: Tensor) -> Tensor:
        """Map tokens [..., D] to [..., 1 + k]: a foreground score (positive: foreground) and the components."""
        return tokens.float().cpu() @ self.weight + self.bias

    @staticmethod
    def colours(projected: Tensor) -> Tensor:
        """RGB [..., 3] in (0, 1) of projected tokens [..., 4]: a sigmoid at twice the deviation, as in the papers."""
        return torch.sigmoid(2 * projected[..., 1:])


def fit_pca(patches: Tensor, *, border: Tensor, foreground: bool = True, components: int = 3) -> PcaBasis:
    """Fit the basis that colours tokens as in the DINOv2 and DINOv3 papers.

    The first principal component of all tokens is split in two by Otsu's threshold. The side of which a larger
    share lies on the image border is the background. The components are those of the foreground alone, whitened.
    The sign of each makes its largest entry positive, so that equal tokens get equal colours everywhere.

    Args:
        patches: [N, D] valid tokens, of one image or of several that are to share their colours.
        border: [N] bool, the tokens on the border of their image.
        foreground: split as above; if not, every token is foreground.
        components: how many; colours need three.

    Raises:
        InputError: no tokens, or tokens that are not finite.
    """
    tokens = patches.float().cpu()
    if not len(tokens):
        raise InputError("no valid tokens to make a picture of: every patch lies in padding or nodata.")
    if not bool(tokens.isfinite().all()):
        raise InputError("the tokens hold NaN or infinity; no colours can be made. Fix: run in precision='fp32'.")
    mean = tokens.mean(0)
    # Rounding alone makes tokens of one value differ in their last bits: below this deviation there is no variance.
    floor = 1e-5 * float(tokens.square().sum(1).mean().sqrt())
    axis = torch.zeros_like(mean)
    shift = 1.0  # no split: every score is 1
    inside = torch.ones(len(tokens), dtype=torch.bool)
    if foreground:
        axis = _principal(tokens - mean, 1, floor=floor)[0][:, 0]
        scores = (tokens - mean) @ axis
        shift = -otsu_threshold(scores)
        if _share(border, scores + shift > 0) > _share(border, scores + shift <= 0):
            axis, scores, shift = -axis, -scores, -shift
        inside = scores + shift > 0
        if inside.sum() < 4:  # constant tokens, or too few to span three components
            axis, shift, inside = torch.zeros_like(mean), 1.0, torch.ones_like(inside)
    centre = tokens[inside].mean(0)
    axes, deviations = _principal(tokens[inside] - centre, components, floor=floor)
    weight = torch.zeros(len(mean), 1 + components)
    weight[:, 0] = axis
    weight[:, 1 : 1 + axes.shape[1]] = axes / deviations
    bias = -(centre @ weight)
    bias[0] = shift - float(mean @ axis)
    return PcaBasis(weight=weight, bias=bias)


def otsu_threshold(values: Tensor) -> float:
    """Split `values` [N] into the two groups of least variance within (Otsu 1979), exactly: return the limit.

    It lies half-way between the two neighbours that it parts; equal values cannot be split and are returned.
    """
    ordered = values.double().sort().values
    count = torch.arange(1, len(ordered), dtype=torch.float64)
    low = ordered.cumsum(0)[:-1]
    gap = low / count - (ordered.sum() - low) / (len(ordered) - count)
    between = count * (len(ordered) - count) * gap**2
    if not len(between) or float(between.max()) == 0.0:
        return float(ordered[0])
    cut = int(between.argmax())
    return float((ordered[cut] + ordered[cut + 1]) / 2)


def _share(part: Tensor, whole: Tensor) -> float:
    return float((part & whole).sum()) / max(1, int(whole.sum()))


def _principal(centred: Tensor, k: int, *, floor: float) -> tuple[Tensor, Tensor]:
    """First `k` principal axes [D, k] of centred tokens [N, D] and their deviations [k].

    An axis whose deviation is not above `floor` is returned as zeros, with deviation 1.
    """
    # Orthogonal iteration on a few spare directions. torch.pca_lowrank does the same in four times the time, and draws
    # from the global random state.
    k = min(k, *centred.shape)
    start = torch.Generator().manual_seed(_SEED)
    basis = torch.randn(centred.shape[1], min(k + 8, *centred.shape), generator=start)
    for _ in range(10):
        basis = torch.linalg.qr(((centred @ basis).mT @ centred).mT).Q
    reduced = (centred @ basis).double()
    variances, rotation = torch.linalg.eigh(reduced.mT @ reduced / len(centred))
    axes = (basis.double() @ rotation.flip(1)[:, :k]).float()
    deviations = variances.flip(0)[:k].clamp(min=0).sqrt().float()
    sign = axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    alive = deviations > floor
    return torch.where(alive, axes * sign, 0.0), torch.where(alive, deviations, 1.0)


def heat_colours(values: Tensor) -> Tensor:
    """RGB [..., 3] in [0, 1] of values [...] in [0, 1], dark violet to pale yellow.

    The scale is perceptually uniform: equal steps in value are equal steps of lightness in the OKLab colour space
    (Ottosson 2020), so it also reads in print and for the colour-blind.
    """
    table = _heat_table()
    position = values.float().cpu().clamp(0, 1) * (len(table) - 1)
    low = position.floor().long().clamp(max=len(table) - 2)
    return torch.lerp(table[low], table[low + 1], (position - low)[..., None])


@functools.cache
def _heat_table() -> Tensor:
    t = torch.linspace(0, 1, 256, dtype=torch.float64)
    lightness = 0.20 + 0.76 * t
    hue = torch.deg2rad(285.0 + 180.0 * t)
    chroma = 0.05 + 0.15 * torch.sin(torch.pi * t.clamp(0, 1)) ** 0.8
    return _oklab_to_srgb(lightness, chroma * hue.cos(), chroma * hue.sin()).float()


def _oklab_to_srgb(lightness: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """OKLab [N] x 3 → gamma-coded sRGB [N, 3], clipped to the gamut."""
    cone = torch.stack(
        [
            lightness + 0.3963377774 * a + 0.2158037573 * b,
            lightness - 0.1055613458 * a - 0.0638541728 * b,
            lightness - 0.0894841775 * a - 1.2914855480 * b,
        ],
        dim=-1,
    )
    to_linear = torch.tensor(
        [
            [4.0767416621, -3.3077115913, 0.2309699292],
            [-1.2684380046, 2.6097574011, -0.3413193965],
            [-0.0041960863, -0.7034186147, 1.7076147010],
        ],
        dtype=cone.dtype,
    )
    linear = (cone**3 @ to_linear.T).clamp(0, 1)
    return torch.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
