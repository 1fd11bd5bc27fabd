"""Owns long lists of text in two tensors, which worker processes share instead of copying a million strings each."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

__all__ = ["PackedText"]


class PackedText:
    """A sequence of str that never changes. Any name a file can have survives, also one that is no UTF-8."""

    def __init__(self, texts: Iterable[str]) -> None:
        encoded = [text.encode("utf-8", "surrogateescape") for text in texts]
        ends = np.cumsum([len(text) for text in encoded], dtype=np.int64)
        self.data: Tensor = torch.frombuffer(bytearray(b"".join(encoded)) or bytearray(1), dtype=torch.uint8)
        """The bytes of all texts, one after another."""
        self.ends: Tensor = torch.from_numpy(ends)
        """Where each text ends in `data`."""

    @classmethod
    def of(cls, data: NDArray[np.uint8], ends: NDArray[np.int64]) -> PackedText:
        """What was packed, from its two arrays."""
        packed = cls(())
        packed.data, packed.ends = torch.from_numpy(data), torch.from_numpy(ends)
        return packed

    @classmethod
    def concatenated(cls, parts: Sequence[PackedText]) -> PackedText:
        """The texts of several, one after another."""
        sizes = [int(part.ends[-1]) if len(part) else 0 for part in parts]
        starts = np.cumsum([0, *sizes])
        data = [part.data.numpy()[:size] for part, size in zip(parts, sizes, strict=True)]
        ends = [part.ends.numpy() + start for part, start in zip(parts, starts[:-1], strict=True)]
        return cls.of(np.concatenate([*data, np.zeros(1, np.uint8)]), np.concatenate(ends))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        if not -len(self) <= index < len(self):
            raise IndexError(f"{index} of {len(self)}")
        index %= len(self)
        start = int(self.ends[index - 1]) if index else 0
        return self.data[start : int(self.ends[index])].numpy().tobytes().decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))
