"""Owns the method: self-supervised training of the backbones, as functions first and a trainer on top."""

from typing import Literal

__all__ = ["Fidelity"]

Fidelity = Literal["released", "paper"]
"""Where the code that trained the released weights does something other than the papers say: which of the two."""
