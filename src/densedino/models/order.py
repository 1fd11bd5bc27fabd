"""Owns the order of a backbone's parameters, from the pixels to the tokens: which layer each belongs to."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["is_token", "layers_of"]

_BLOCK = re.compile(r"(?:blocks|stages\.(\d+))\.(\d+)\.")


def is_token(name: str) -> bool:
    """Whether it is a class, mask or register token."""
    return name.endswith(("_token", "_tokens"))


def layers_of(names: Sequence[str]) -> dict[str, int]:
    """The layer of each of a backbone's parameters: 0 embeddings and tokens, 1…depth blocks, depth + 1 the rest.

    A ConvNeXt's blocks count through its stages; what stands between two stages belongs to the block after it.
    """
    matches = {name: _BLOCK.match(name) for name in names}
    places = {name: (int(match[1] or 0), int(match[2])) for name, match in matches.items() if match}
    order = {place: layer for layer, place in enumerate(sorted(set(places.values())), start=1)}

    def layer(name: str) -> int:
        if name in places:
            return order[places[name]]
        if between := re.match(r"downsample_layers\.([1-9])\.", name):
            return order[int(between[1]), 0]
        embeds = name.startswith(("patch_embed.", "downsample_layers.0.")) or is_token(name)
        return 0 if embeds else len(order) + 1

    return {name: layer(name) for name in names}
