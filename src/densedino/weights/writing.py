"""Owns writing a safetensors file tensor by tensor, so that a file larger than the memory can be written."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING

import torch

from densedino.checkpoint import atomic_path

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from torch import Tensor

__all__ = ["write_tensors"]

_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float64: "F64",
    torch.int8: "I8",
    torch.uint8: "U8",
}


def write_tensors(
    path: Path,
    shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    tensors: Iterable[Tensor],
    *,
    metadata: Mapping[str, str],
) -> None:
    """Write `tensors`, which come one by one in the order of `shapes`; the file is there when it is whole.

    Args:
        path: replaced if it exists.
        shapes: shape and type by name; types of float and byte kinds.
        tensors: one per name, on the CPU.
        metadata: of the header.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for key, (shape, dtype) in shapes.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[key] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 64)  # matrices begin at multiples of their own size, and then of a cache line
    with atomic_path(path) as scratch, scratch.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (shape, dtype), tensor in zip(shapes.values(), tensors, strict=True):
            if tuple(tensor.shape) != tuple(shape) or tensor.dtype != dtype:
                raise ValueError(f"a {dtype} tensor {tuple(tensor.shape)} where {dtype} {tuple(shape)} was announced")
            file.write(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data)
