"""Owns the filmstrip: PCA pictures of a few fixed images from look to look, in colours that keep their meaning."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from densedino.features.colours import PcaBasis, fit_pca
from densedino.features.tokens import upsample_tokens

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["filmstrip"]


@torch.no_grad()
def filmstrip(looks: Sequence[Tensor], *, side: int = 112) -> Tensor:
    """Colour the patches of one image at several looks by their first three principal components.

    Each look has a basis of its own, whose axes may come in any order and direction. So each is turned (orthogonal
    Procrustes, on the image's own patches) to agree as well as can be with the look after it, from the last backwards:
    what keeps its place among the patches keeps its colour.

    Args:
        looks: patches [h, w, D] of the image, in the order of time; D may differ.
        side: pixels of the longer side of a picture.

    Returns:
        uint8 [n, H, W, 3].
    """
    pictures: list[Tensor] = []
    later: Tensor | None = None
    for patches in reversed(looks):
        h, w, _ = patches.shape
        flat = patches.flatten(0, 1)
        basis = fit_pca(flat, border=torch.zeros(len(flat), dtype=torch.bool), foreground=False)
        projected = basis.project(flat)
        if later is not None:
            u, _, vh = torch.linalg.svd(projected[:, 1:].T @ later)
            projected[:, 1:] = projected[:, 1:] @ (u @ vh)
        later = projected[:, 1:]
        size = (max(1, round(side * h / max(h, w))), max(1, round(side * w / max(h, w))))
        pixels = upsample_tokens(projected.view(1, h, w, 4), size)[0].permute(1, 2, 0)
        pictures.append((PcaBasis.colours(pixels) * 255).round().byte())
    return torch.stack(pictures[::-1])
