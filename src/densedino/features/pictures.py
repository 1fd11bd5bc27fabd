"""Owns pictures of features: PCA colours, similarity to a patch, attention, each over the pixels of its image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from PIL import Image

from densedino.errors import InputError
from densedino.features.colours import PcaBasis, fit_pca, heat_colours
from densedino.features.tokens import upsample_tokens
from densedino.models.vit import VisionTransformer

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Literal

    from torch import Tensor

    from densedino.features.extractor import FeatureExtractor
    from densedino.features.tokens import Features
    from densedino.images.transforms import Prepared

__all__ = [
    "Picture",
    "attention_images",
    "cls_attention",
    "patch_at",
    "pca_images",
    "picture_size",
    "similarity_images",
]


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One picture of one image's features, in register with the image's pixels."""

    image: Image.Image
    """RGB."""
    title: str
    scale: tuple[float, float] | None = None
    """The values at the two ends of the heat colours; None if colours are not values."""
    box: tuple[float, float, float, float] | None = None
    """Left, top, right and bottom of the patch that was asked about, as fractions of the image."""


@dataclass(frozen=True)
class _Grid:
    """The tokens of one image on their grid."""

    tokens: Tensor
    """[h, w, D]."""
    valid: Tensor
    """[h, w] bool: the whole patch is image."""
    shown: Tensor
    """[h, w] bool: valid, or at the edge and only partly padding. It has image pixels, which want a colour."""
    stride: float
    extent: tuple[int, int]
    """(H, W) in input pixels, without padding."""
    source: tuple[int, int]
    """(H, W) of the image as decoded."""


def picture_size(source: tuple[int, int], long_side: int | None) -> tuple[int, int]:
    """(H, W) of the picture of an image of `source` (H, W) pixels whose longer side is to have `long_side` pixels."""
    factor = 1.0 if long_side is None else long_side / max(source)
    return max(1, round(source[0] * factor)), max(1, round(source[1] * factor))


def _grids(features: Iterable[Features], layer: int | None) -> list[_Grid]:
    grids = []
    for one in (image for batch in features for image in batch):
        if layer is not None and layer not in one.layers:
            raise InputError(
                f"layer {layer} was not kept, only {sorted(one.layers)}. Fix: dino(images, layers=[{layer}])."
            )
        tokens = (one.patches if layer is None else one.layers[layer].patches)[0]
        finer = tokens.shape[0] // one.grid[0]  # early ConvNeXt stages have a finer grid
        valid = one.valid[0].cpu()
        shown = valid.clone()
        if one.input_sizes[0][0] % one.stride:
            shown[-1] = shown[-2] if len(shown) > 1 else True
        if one.input_sizes[0][1] % one.stride:
            shown[:, -1] = shown[:, -2] if shown.shape[1] > 1 else True
        valid, shown = (m.repeat_interleave(finer, 0).repeat_interleave(finer, 1) for m in (valid, shown))
        grids.append(
            _Grid(tokens.cpu().float(), valid, shown, one.stride / finer, one.input_sizes[0], one.source_sizes[0])
        )
    return grids


def pca_images(
    features: Iterable[Features],
    *,
    foreground: bool = False,
    joint: bool = False,
    background: Literal["black", "keep"] = "black",
    layer: int | None = None,
    long_side: int | None = None,
    smooth: bool = True,
) -> list[Picture]:
    """Colour tokens by their first three principal components, as the figures of the DINOv2 and DINOv3 papers do.

    Args:
        features: of one or more images: one batch, or several.
        foreground: split object from background by the first component and colour by the components of the object
            alone (`fit_pca` says how); good for a thing before a backdrop, wrong for a scene that has no backdrop.
        joint: one basis for all images, so that equal colours mean equal features; else each image has its own.
        background: with `foreground`, whether background patches are black or keep the colours of the same basis.
        layer: one of `features.layers` instead of the model's final tokens.
        long_side: pixels of the longer side of every picture; as many as the image as decoded has, if not given.
        smooth: interpolate between patches (exact to the half pixel); else every patch is one flat square.

    Raises:
        InputError: no valid patch, features that are not finite, or a layer that was not kept.
    """
    grids = _grids(features, layer)
    bases = [_fit(grids, foreground)] * len(grids) if joint else [_fit([grid], foreground) for grid in grids]
    pictures = []
    for grid, basis in zip(grids, bases, strict=True):
        projected, covered = _to_pixels(basis.project(grid.tokens), grid, long_side, smooth=smooth)
        rgb = PcaBasis.colours(projected)
        if foreground and background == "black":
            rgb = torch.where(projected[..., :1] > 0, rgb, 0.0)
        title = "PCA of the foreground" if foreground else "PCA of all patches"
        pictures.append(Picture(image=_image(rgb, covered), title=title + (", joint" if joint else "")))
    return pictures


def _fit(grids: Sequence[_Grid], foreground: bool) -> PcaBasis:
    masks = [grid.valid for grid in grids]
    if not any(bool(mask.any()) for mask in masks):
        masks = [grid.shown for grid in grids]  # images smaller than a patch
    tokens = torch.cat([grid.tokens[mask] for grid, mask in zip(grids, masks, strict=True)])
    border = torch.cat([_border(mask)[mask] for mask in masks])
    return fit_pca(tokens, border=border, foreground=foreground)


def _border(mask: Tensor) -> Tensor:
    """Mark the tokens [h, w] of `mask` that have a neighbour outside of it."""
    m = F.pad(mask, (1, 1, 1, 1))
    return mask & ~(m[:-2, 1:-1] & m[2:, 1:-1] & m[1:-1, :-2] & m[1:-1, 2:])


def patch_at(features: Features, point: tuple[float, float], *, layer: int | None = None) -> tuple[int, int]:
    """(row, column) of the patch that shows pixel `point` = (x, y) of the first image, as decoded.

    Raises:
        InputError: the point lies outside the image.
    """
    grid = _grids([features[0]], layer)[0]
    (x, y), (height, width) = point, grid.source
    if not (0 <= x < width and 0 <= y < height):
        raise InputError(
            f"point {x:g},{y:g} lies outside the image, which is {width} pixels wide and {height} high: "
            f"x must be 0 to {width - 1} and y 0 to {height - 1}."
        )
    # Half a pixel in: the centre of a whole pixel never falls on the line between two patches of the original.
    row = int((y + 0.5) * grid.extent[0] / height / grid.stride)
    col = int((x + 0.5) * grid.extent[1] / width / grid.stride)
    return min(row, grid.tokens.shape[0] - 1), min(col, grid.tokens.shape[1] - 1)


def similarity_images(
    features: Iterable[Features],
    *,
    patch: tuple[int, int],
    layer: int | None = None,
    long_side: int | None = None,
    smooth: bool = True,
) -> list[Picture]:
    """Cosine similarity of every patch of every image to `patch` = (row, column) of the first one.

    All pictures share one scale of colours. For a pixel instead of a patch, see `patch_at`; for the rest, `pca_images`.

    Raises:
        InputError: `patch` is not on the grid, or is padding or nodata; or as `pca_images`.
    """
    grids = _grids(features, layer)
    rows, cols = grids[0].shown.shape
    row, col = patch
    if not (0 <= row < rows and 0 <= col < cols):
        raise InputError(
            f"patch {row},{col} is not on the grid of {rows}×{cols} patches: "
            f"row must be 0 to {rows - 1} and column 0 to {cols - 1}."
        )
    if not grids[0].shown[row, col]:
        raise InputError(f"patch {row},{col} is padding or nodata; ask about a patch that shows the image.")
    query = F.normalize(grids[0].tokens[row, col], dim=0)
    maps = [F.normalize(grid.tokens, dim=-1) @ query for grid in grids]
    seen = torch.cat([values[grid.shown] for values, grid in zip(maps, grids, strict=True)])
    scale = (float(seen.min()), float(seen.max()))
    height, width = (side / grids[0].stride for side in grids[0].extent)
    box = (col / width, row / height, min(1.0, (col + 1) / width), min(1.0, (row + 1) / height))
    title = f"cosine similarity to patch {row},{col} (row, column)"
    return [
        _heat(values, grid, scale, title=title, box=box if i == 0 else None, long_side=long_side, smooth=smooth)
        for i, (values, grid) in enumerate(zip(maps, grids, strict=True))
    ]


def cls_attention(dino: FeatureExtractor, prepared: Prepared, *, layer: int = -1) -> Tensor:
    """How the CLS token attends to the patches of one prepared image: [heads, h, w], float32.

    A head's values sum to what it does not spend on CLS and registers. Always computed in the model's own float32.

    Raises:
        InputError: a model without attention or without its weights in memory, or no such layer.
    """
    model = dino.model
    if not isinstance(model, VisionTransformer):
        raise InputError(
            f"{dino.card.model} is a ConvNeXt and has no attention. Use a ViT, or another kind of picture."
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise InputError(
            f"{dino.card.source}: this engine holds no weights that attention could be computed with. Load the weights "
            "themselves, with engine='eager'."
        )
    pixels = prepared.pixels[None].to(dino.device)
    height, width = model.grid_size(pixels)
    first = 1 + model.num_register_tokens
    with torch.inference_mode():
        (of_cls,) = model.get_attention_maps(pixels, n=[layer], queries=slice(0, 1))
    return of_cls[0, :, 0, first:].reshape(-1, height, width).cpu()


def attention_images(
    features: Iterable[Features],
    attention: Sequence[Tensor],
    *,
    head: int | None = None,
    long_side: int | None = None,
    smooth: bool = True,
) -> list[Picture]:
    """Heat maps of attention (`cls_attention`), one [heads, h, w] per image of `features`; each has its own scale.

    Args:
        features: of the images; says where padding is.
        attention: one map per image.
        head: which head, 0 the first; the mean over heads if not given.
        long_side: as in `pca_images`.
        smooth: as in `pca_images`.

    Raises:
        InputError: no such head.
    """
    pictures = []
    for grid, maps in zip(_grids(features, None), attention, strict=True):
        if head is not None and not 0 <= head < len(maps):
            raise InputError(f"head {head}: this model has {len(maps)} heads, 0 to {len(maps) - 1}.")
        values = maps.float().mean(0) if head is None else maps[head].float()
        seen = values[grid.shown]
        scale = (float(seen.min()), float(seen.max())) if len(seen) else (0.0, 0.0)
        title = f"attention of CLS, {f'mean of {len(maps)} heads' if head is None else f'head {head}'}"
        pictures.append(_heat(values, grid, scale, title=title, long_side=long_side, smooth=smooth))
    return pictures


def _heat(
    values: Tensor,
    grid: _Grid,
    scale: tuple[float, float],
    *,
    title: str,
    box: tuple[float, float, float, float] | None = None,
    long_side: int | None,
    smooth: bool,
) -> Picture:
    pixels, covered = _to_pixels(values[..., None], grid, long_side, smooth=smooth)
    span = scale[1] - scale[0]
    rgb = heat_colours((pixels[..., 0] - scale[0]) / (span if span > 0 else 1.0))
    return Picture(image=_image(rgb, covered), title=title, scale=scale, box=box)


def _to_pixels(values: Tensor, grid: _Grid, long_side: int | None, *, smooth: bool) -> tuple[Tensor, Tensor]:
    """Values per token [h, w, C] → values per pixel [H, W, C] and whether a pixel belongs to a shown patch [H, W].

    Tokens that are not shown have no part in the interpolation.
    """
    height, width = picture_size(grid.source, long_side)
    rows = ((torch.arange(height) + 0.5) * (grid.extent[0] / height / grid.stride)).long()
    cols = ((torch.arange(width) + 0.5) * (grid.extent[1] / width / grid.stride)).long()
    covered = grid.shown[rows][:, cols]
    if not smooth:
        return values[rows][:, cols], covered
    weight = grid.shown[..., None].float()
    both = torch.cat([torch.where(weight > 0, values, 0.0), weight], dim=-1)
    pixels = upsample_tokens(both[None], (height, width), extent=grid.extent, stride=grid.stride)[0].permute(1, 2, 0)
    return pixels[..., :-1] / pixels[..., -1:].clamp(min=1e-6), covered


def _image(rgb: Tensor, covered: Tensor) -> Image.Image:
    """RGB [H, W, 3] in [0, 1] as an image; what is not covered is hatched in grey."""
    height, width = covered.shape
    stripes = (torch.arange(height)[:, None] + torch.arange(width)) % 12 < 4
    hatch = torch.where(stripes, 0.62, 0.80)[..., None]
    pixels = torch.where(covered[..., None], rgb, hatch)
    return Image.fromarray((pixels * 255).round().clamp(0, 255).byte().numpy())
