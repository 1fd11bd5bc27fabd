"""Owns windows that slide over a picture, and results brought to the picture's own pixels in little memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

__all__ = ["classes_at", "resized", "slide", "window_bounds"]

_STRIP_BYTES = 1 << 27


def window_bounds(side: int, *, crop: int, stride: int) -> list[tuple[int, int]]:
    """Windows along one side: `stride` apart, the last one moved back so that it ends where the side does."""
    number = max(side - crop + stride - 1, 0) // stride + 1
    ends = [min(start * stride + crop, side) for start in range(number)]
    return [(max(end - crop, 0), end) for end in ends]


def slide(image: Tensor, answer: Callable[[Tensor], Tensor], *, crop: int, stride: int) -> Tensor:
    """Mean of the answers of all windows that hold a pixel: [1, 3, H, W] to [1, C, H, W].

    Args:
        image: at the size in which it is looked at.
        answer: window [1, 3, h, w] to [1, C, h, w].
        crop: side of a window; of the image's shorter side, if the image is smaller than a window both ways.
        stride: from one window to the next.
    """
    H, W = image.shape[2:]
    if crop > H and crop > W:
        crop = min(H, W)
    total: Tensor | None = None
    count = torch.zeros(1, 1, H, W, device=image.device)
    for y0, y1 in window_bounds(H, crop=crop, stride=stride):
        for x0, x1 in window_bounds(W, crop=crop, stride=stride):
            said = answer(image[:, :, y0:y1, x0:x1])
            if total is None:
                total = said.new_zeros(1, said.shape[1], H, W)
            total[:, :, y0:y1, x0:x1] += said
            count[:, :, y0:y1, x0:x1] += 1
            del said
    assert total is not None  # a side has at least one window
    return total.div_(count)


def resized(values: Tensor, size: tuple[int, int]) -> Tensor:
    """[1, C, h, w] to [1, C, H, W], bilinear, half-pixel centres."""
    return values if values.shape[2:] == size else F.interpolate(values, size=size, mode="bilinear")


def _strips(values: Tensor, size: tuple[int, int]) -> Iterator[tuple[slice, Tensor]]:
    """`resized` by rows: (rows, [C, n, W]), so that the whole is never there."""
    (height, width), (C, h, w) = size, values.shape[1:]
    step = max(1, _STRIP_BYTES // (4 * C * max(width, w)))
    for top in range(0, height, step):
        rows = torch.arange(top, min(top + step, height), device=values.device)
        place = ((rows + 0.5) * (h / height) - 0.5).clamp(min=0)
        low = place.long().clamp(max=h - 1)
        share = (place - low)[:, None]
        lines = torch.lerp(values[0, :, low], values[0, :, (low + 1).clamp(max=h - 1)], share)
        yield slice(top, top + len(rows)), F.interpolate(lines[None], size=(len(rows), width), mode="bilinear")[0]


def classes_at(values: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The class of the largest value at each pixel, and that value: uint8 or int16 [H, W], float32 [H, W].

    Args:
        values: [1, C, h, w].
        size: (H, W).
    """
    dtype = torch.uint8 if values.shape[1] <= 256 else torch.int16
    classes, best = torch.empty(size, dtype=dtype), torch.empty(size)
    for rows, strip in _strips(values, size):
        top = strip.max(dim=0)
        classes[rows], best[rows] = top.indices.to("cpu", dtype), top.values.cpu()
    return classes, best
