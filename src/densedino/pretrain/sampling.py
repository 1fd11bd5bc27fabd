"""Owns the order of training: which picture of which source stands at a place of a step, computed, never replayed."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import numpy as np

from densedino.errors import InputError
from densedino.pretrain.randomness import counted_generator, counted_seed

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

__all__ = ["Permutation", "Sampler", "choose"]

BLOCK = 10_000
"""Choices among sources that together have exactly the shares of the weights, to a ten thousandth."""

ROUNDS = 8
_GOLDEN, _WORD = 0x9E3779B97F4A7C15, 2**64 - 1


class Permutation:
    """A permutation of range(length), of which any entry is had at once and none is stored.

    A Feistel network over the next power of four, whose values outside the range are sent through it again until they
    fall inside (cycle walking; Black and Rogaway 2002): a bijection, whatever the key.
    """

    def __init__(self, length: int, *, key: int) -> None:
        self._length = length
        self._half = max(4, ((length - 1).bit_length() + 1) // 2)  # in small domains a network is not random enough
        self._keys = [_mix(key + r * _GOLDEN & _WORD) for r in range(1, ROUNDS + 1)]

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, place: int) -> int:
        if not 0 <= place < self._length:
            raise IndexError(f"{place} of {self._length}")
        value, half, mask = place, self._half, (1 << self._half) - 1
        while True:
            left, right = value >> half, value & mask
            for key in self._keys:
                left, right = right, left ^ (_mix(right + key & _WORD) & mask)
            value = left << half | right
            if value < self._length:
                return value


def _mix(x: int) -> int:
    """The finaliser of SplitMix64: 64 bits to 64 bits, one to one, each depending on all."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _WORD
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _WORD
    return x ^ x >> 31


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """The order in which the pictures of one or several sources come; a function of (seed, step, place) alone.

    Each source is a stream without end: all of its pictures in random order, then all of them in another order, and
    so on. A step takes the next of them, so that no picture comes again before its source's epoch is over. Processes,
    workers and micro-batches have no part in it: they take the places of the global batch that are theirs.
    """

    lengths: tuple[int, ...]
    """Pictures of each source."""
    batch_size: int
    """Pictures of a step, over all processes."""
    seed: int
    weights: tuple[float, ...] | None = None
    """Share of each source, relative to the others; by default its number of pictures."""
    homogeneous: bool = False
    """Whether all pictures of a step come from one source (DINOv3 §3.1)."""

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 1:
            raise InputError(f"sources with {self.lengths} pictures; each needs one or more.")
        if self.batch_size < 1:
            raise InputError(f"batch_size is {self.batch_size}; it is 1 or more.")
        weights = self.weights
        if weights is not None and (len(weights) != len(self.lengths) or not all(0 < w < np.inf for w in weights)):
            raise InputError(f"weights={weights} for {len(self.lengths)} sources; give each one a number above 0.")
        if len(self.lengths) > BLOCK:
            raise InputError(f"{len(self.lengths):,} sources; up to {BLOCK:,} are mixed. Put them in one text list.")

    @cached_property
    def quotas(self) -> tuple[int, ...]:
        """How many of every `BLOCK` choices go to each source; one at least."""
        weights = np.array(self.weights or self.lengths, dtype=np.float64)
        exact = weights / weights.sum() * BLOCK
        quotas = np.maximum(1, np.floor(exact)).astype(int)
        for _ in range(BLOCK - quotas.sum()):
            quotas[np.argmax(exact - quotas)] += 1
        for _ in range(quotas.sum() - BLOCK):
            quotas[np.argmax(quotas)] -= 1
        return tuple(quotas.tolist())

    def candidates(self, step: int, place: int) -> Iterator[tuple[int, int]]:
        """(source, index) of the picture at `place` of `step`; then what to take instead, if that is unreadable.

        The replacements are what the same place gets later in the source's epoch, then what it got earlier in it:
        within an epoch they are no other place's pictures, nor its replacements.
        """
        choice = step if self.homogeneous else step * self.batch_size + place
        block, offset = divmod(choice, BLOCK)
        sources, ranks = _arrangement(self.quotas, self.seed, block)
        source = int(sources[offset])
        chosen_before = block * self.quotas[source] + int(ranks[offset])
        position = chosen_before * self.batch_size + place if self.homogeneous else chosen_before
        for other in _strides(position, length=self.lengths[source], stride=self.batch_size):
            yield source, self._index(source, other)

    def _index(self, source: int, position: int) -> int:
        epoch, place = divmod(position, self.lengths[source])
        return _order(self.lengths[source], self.seed, epoch, source)[place]


def choose(shares: Sequence[float], *, purpose: str, seed: int, step: int) -> int:
    """One of `shares`, each as likely as its share of their sum; the same in every process."""
    ends = np.cumsum(shares) / np.sum(shares)
    draw = counted_generator(purpose, seed=seed, step=step).random()
    return min(int(np.searchsorted(ends, draw, side="right")), len(ends) - 1)


def _strides(position: int, *, length: int, stride: int) -> Iterator[int]:
    """`position`, and others whole strides away: on to the epoch's end, back to its start, then the next epochs."""
    start = position - position % length
    yield from range(position, start + length, stride)
    yield from range(position - stride, start - 1, -stride)
    beyond = -(-(start + length - position) // stride)
    yield from itertools.count(position + beyond * stride, stride)


@lru_cache(maxsize=64)
def _order(length: int, seed: int, epoch: int, source: int) -> Permutation:
    return Permutation(length, key=counted_seed("order of pictures", seed=seed, step=epoch, index=source))


@lru_cache(maxsize=16)
def _arrangement(quotas: tuple[int, ...], seed: int, block: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Of each choice in a block: its source, and how many earlier ones in the block have the same source."""
    sources = np.repeat(np.arange(len(quotas)), quotas)
    sources = counted_generator("mixture of sources", seed=seed, step=block).permutation(sources)
    ranks = np.empty_like(sources)
    ranks[np.argsort(sources, kind="stable")] = np.concatenate([np.arange(quota) for quota in quotas])
    return sources, ranks
