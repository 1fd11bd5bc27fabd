"""Owns tensors that stay in their file until they are wanted: where their bytes lie, and reading them into memory.

A mapped tensor costs nothing until it is touched, but what is touched counts as the process's memory. Here the bytes
are read beside the mapping, straight into a buffer, so that a model larger than the memory passes through a small one.
"""

from __future__ import annotations

import bisect
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from densedino.errors import WeightsError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["CHUNK", "Piece", "Stored", "locate"]

CHUNK = 1 << 15
"""Numbers converted at a time: PyTorch does not spread so few over threads, which are the computation's."""
_STAGE = 1 << 22  # bytes read at a time where they are converted


@dataclass(frozen=True)
class Piece:
    """A tensor as it lies in a file, or in memory where `path` is empty."""

    tensor: Tensor
    path: str = ""
    offset: int = 0
    """Of its first byte in the file."""
    inode: int = 0

    def read_bytes(self, out: memoryview, start: int) -> None:
        """Fill `out` with the file's bytes from `start` of this tensor on.

        Raises:
            WeightsError: the file has been changed or cut off since it was opened.
        """
        handle = os.open(self.path, os.O_RDONLY)
        try:
            if os.fstat(handle).st_ino != self.inode:
                raise WeightsError(f"{self.path} was replaced while its weights were in use. Load it again.")
            done = 0
            while done < len(out):
                got = os.preadv(handle, [out[done:]], self.offset + start + done)
                if not got:
                    raise WeightsError(f"{self.path} was cut off while its weights were in use. Get it again.")
                done += got
        finally:
            os.close(handle)

    def read(self, out: Tensor) -> None:
        """Copy into `out`, contiguous and of as many numbers, converting to its type."""
        flat, source = out.view(-1), self.tensor.detach()
        if not self.path:
            _convert(source.reshape(-1), flat)
        elif out.dtype == source.dtype:
            self.read_bytes(flat.view(torch.uint8).numpy().data, 0)
        else:
            size = source.element_size()
            stage = torch.empty(min(_STAGE, source.nbytes) // size, dtype=source.dtype)
            for start in range(0, flat.numel(), len(stage)):
                part = stage[: flat.numel() - start]
                self.read_bytes(part.view(torch.uint8).numpy().data, start * size)
                _convert(part, flat[start : start + len(part)])


def _convert(source: Tensor, out: Tensor) -> None:
    for start in range(0, len(out), CHUNK):
        out[start : start + CHUNK].copy_(source[start : start + CHUNK])


@dataclass(frozen=True)
class Stored:
    """One tensor of a model: a piece of a file, or several that are to be joined along the first dimension."""

    pieces: tuple[Piece, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return sum(piece.tensor.nbytes for piece in self.pieces)

    def read(self, out: Tensor) -> None:
        """Copy into `out` [rows, ...], contiguous, converting to its type."""
        row = 0
        for piece in self.pieces:
            rows = piece.tensor.shape[0] if piece.tensor.ndim else 1
            piece.read(out[row : row + rows] if len(self.pieces) > 1 else out)
            row += rows


def locate(tensors: Mapping[str, Iterable[Tensor]]) -> dict[str, Stored]:
    """Find in which files the tensors lie; those that are in no file, or not in one piece, are taken from memory."""
    areas = _mapped_areas()
    return {key: Stored(tuple(_locate(tensor, areas) for tensor in parts)) for key, parts in tensors.items()}


def _locate(tensor: Tensor, areas: list[tuple[int, int, int, int, str]]) -> Piece:
    address = tensor.data_ptr()
    place = bisect.bisect_right(areas, address, key=lambda area: area[0]) - 1
    if place < 0 or not tensor.is_contiguous() or tensor.device.type != "cpu":
        return Piece(tensor)
    start, end, offset, inode, path = areas[place]
    if address + tensor.nbytes > end:
        return Piece(tensor)
    return Piece(tensor, path, offset + address - start, inode)


def _mapped_areas() -> list[tuple[int, int, int, int, str]]:
    """(first address, end, offset in the file, inode, path) of every unchanged file in this process's memory."""
    if sys.platform != "linux":
        return []
    areas = []
    for line in Path("/proc/self/maps").read_text(errors="surrogateescape").splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5].startswith("/") and not fields[5].endswith(" (deleted)"):
            start, end = (int(text, 16) for text in fields[0].split("-"))
            areas.append((start, end, int(fields[2], 16), int(fields[4]), fields[5]))
    return sorted(areas)
