"""Owns `densedino models`: the table of architectures with their exact sizes. Imports no torch."""

from __future__ import annotations

from typing import Annotated

import tyro

from densedino.models.catalog import MODELS, ViTSpec, list_models
from densedino.models.counts import multiplications, parameter_count

__all__ = ["run"]


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
