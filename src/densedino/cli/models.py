"""Owns `densedino models`: the table of architectures with their exact sizes. Imports no torch."""

from __future__ import annotations

from typing import Annotated

import tyro

from densedino.models.catalog import MODELS, ConvNeXtSpec, ViTSpec, list_models

__all__ = ["multiplications", "parameter_count", "run"]


def run(pattern: Annotated[str, tyro.conf.Positional] = "*") -> None:
    """List the architectures: exact parameter counts, multiply-accumulates of one 224×224 image.

    Args:
        pattern: names to list, with shell wildcards: 'vit*', '*plus'.
    """
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("model", "kind", "width", "depth", "heads", "stride", "parameters", "GMAC at 224²"):
        table.add_column(heading, justify="left" if heading in ("model", "kind") else "right", no_wrap=True)
    for name in list_models(pattern):
        spec = MODELS[name]
        table.add_row(
            name,
            f"ViT, {'SwiGLU' if spec.ffn == 'swiglu' else 'MLP'}" if isinstance(spec, ViTSpec) else "ConvNeXt",
            str(spec.embed_dim),
            str(spec.depth) if isinstance(spec, ViTSpec) else "-".join(map(str, spec.depths)),
            str(spec.num_heads) if isinstance(spec, ViTSpec) else "",
            str(spec.stride),
            f"{parameter_count(spec):,}",
            f"{multiplications(spec) / 1e9:,.2f}",
        )
    console = Console()
    console.print(table) if console.is_terminal else Console(width=200).print(table)  # a pipe gets whole lines


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
    dim, hidden = spec.embed_dim, spec.hidden_dim
    inner = hidden * (dim + 1) * (2 if spec.ffn == "swiglu" else 1) + (hidden + 1) * dim
    block = 3 * dim * (dim + spec.qkv_bias) + dim * (dim + 1) + inner + 6 * dim
    tokens = (2 + spec.num_register_tokens) * dim
    norms = (2 + 2 * spec.local_cls_norm) * dim
    return (in_chans * spec.patch_size**2 + 1) * dim + tokens + spec.depth * block + norms


def multiplications(spec: ViTSpec | ConvNeXtSpec, *, side: int = 224, in_chans: int = 3) -> int:
    """Multiply-accumulates of one forward pass of a square image, in matrix products and convolutions."""
    if isinstance(spec, ConvNeXtSpec):
        widths = (in_chans, *spec.dims)
        total = 0
        for i, depth in enumerate(spec.depths):
            before, after, kernel = widths[i], widths[i + 1], 4 if i == 0 else 2
            places = (side // (4 * 2**i)) ** 2
            total += places * after * (before * kernel**2 + depth * (49 + 8 * after))
        return total
    dim, patches = spec.embed_dim, (side // spec.patch_size) ** 2
    tokens = patches + 1 + spec.num_register_tokens
    linear = 4 * dim**2 + (3 if spec.ffn == "swiglu" else 2) * dim * spec.hidden_dim
    return patches * in_chans * spec.patch_size**2 * dim + spec.depth * tokens * (linear + 2 * tokens * dim)
