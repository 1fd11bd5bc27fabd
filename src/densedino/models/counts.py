"""Owns arithmetic on the architecture table: parameters and multiplications, from a spec alone. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from densedino.models.catalog import ConvNeXtSpec

if TYPE_CHECKING:
    from densedino.models.catalog import ViTSpec

__all__ = ["block_parameters", "multiplications", "parameter_count"]


def block_parameters(spec: ViTSpec) -> int:
    """Parameters of one block of a ViT: of the largest, if it is pruned."""
    return max(_block_parameters(spec, heads, hidden) for heads, hidden in spec.blocks)


def _block_parameters(spec: ViTSpec, heads: int, hidden: int) -> int:
    dim, width = spec.embed_dim, heads * spec.head_dim
    inner = hidden * (dim + 1) * (2 if spec.ffn == "swiglu" else 1) + (hidden + 1) * dim
    return 3 * width * (dim + spec.qkv_bias) + dim * (width + 1) + inner + 6 * dim


def parameter_count(spec: ViTSpec | ConvNeXtSpec, *, in_chans: int = 3) -> int:
    """Parameters of a model, from its spec alone."""
    if isinstance(spec, ConvNeXtSpec):
        widths = (in_chans, *spec.dims)
        total = 2 * spec.embed_dim
        for i, depth in enumerate(spec.depths):
            before, after, kernel = widths[i], widths[i + 1], 4 if i == 0 else 2
            total += (before * kernel**2 + 1) * after + 2 * (after if i == 0 else before)
            total += depth * ((49 + 1) * after + 2 * after + (8 * after + 5) * after + after)
        return total
    tokens = (2 + spec.num_register_tokens) * spec.embed_dim
    norms = (2 + 2 * spec.local_cls_norm) * spec.embed_dim
    blocks = sum(_block_parameters(spec, heads, hidden) for heads, hidden in spec.blocks)
    return (in_chans * spec.patch_size**2 + 1) * spec.embed_dim + tokens + blocks + norms


def multiplications(spec: ViTSpec | ConvNeXtSpec, *, side: int | tuple[int, int] = 224, in_chans: int = 3) -> int:
    """Multiply-accumulates of one forward pass of an image, in matrix products and convolutions.

    `side`: of a square image in pixels, or (height, width); what is no multiple of the stride is cut off.
    """
    height, width = (side, side) if isinstance(side, int) else side
    if isinstance(spec, ConvNeXtSpec):
        widths = (in_chans, *spec.dims)
        total = 0
        for i, depth in enumerate(spec.depths):
            before, after, kernel = widths[i], widths[i + 1], 4 if i == 0 else 2
            places = (height // (4 * 2**i)) * (width // (4 * 2**i))
            total += places * after * (before * kernel**2 + depth * (49 + 8 * after))
        return total
    dim, patches = spec.embed_dim, (height // spec.patch_size) * (width // spec.patch_size)
    tokens = patches + 1 + spec.num_register_tokens
    inner = (3 if spec.ffn == "swiglu" else 2) * dim
    blocks = sum(heads * spec.head_dim * (4 * dim + 2 * tokens) + inner * hidden for heads, hidden in spec.blocks)
    return patches * in_chans * spec.patch_size**2 * dim + tokens * blocks
