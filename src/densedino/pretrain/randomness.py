"""Owns counted randomness: every draw comes from a generator seeded by what it is for, never from a carried state."""

from __future__ import annotations

import hashlib

import numpy as np

__all__ = ["counted_generator", "counted_seed"]


def counted_seed(purpose: str, *, seed: int, step: int = 0, index: int = 0) -> int:
    """A 63-bit seed, for `torch.Generator.manual_seed`, that is another for every (purpose, run seed, step, index)."""
    digest = hashlib.blake2b(f"{purpose}/{seed}/{step}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def counted_generator(purpose: str, *, seed: int, step: int = 0, index: int = 0) -> np.random.Generator:
    """A generator of its own for every (purpose, run seed, step, index)."""
    return np.random.default_rng(counted_seed(purpose, seed=seed, step=step, index=index))
