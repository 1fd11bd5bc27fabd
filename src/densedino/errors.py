"""Owns the errors a user can meet: each says what was received, what is valid, and what to do.

DenseDinoError
├── InputError (ValueError)          a value, a name, a size that cannot be used
│   ├── UnknownNameError             a name that is in no table; names the nearest one
│   └── ImageError                   a file or array that is not a usable image
├── WeightsError (RuntimeError)      a checkpoint that is not what it should be
│   ├── WeightsNotFoundError         no such file, or not to be had without a step by the user
│   ├── DownloadError                expired URL, HTML instead of weights, truncated, wrong hash
│   └── StateDictError               tensors that do not fit the architecture
├── StoreError (RuntimeError)        a feature store that cannot be read or must not be written
├── TrainingError (RuntimeError)     a run that cannot go on
└── MissingExtraError (ImportError)  an optional dependency that is not installed; names the pip command

UntrainedWarning (UserWarning)       the default weights are random numbers: features are noise
"""

from __future__ import annotations

import difflib
import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = [
    "DenseDinoError",
    "DownloadError",
    "ImageError",
    "InputError",
    "MissingExtraError",
    "StateDictError",
    "StoreError",
    "TrainingError",
    "UnknownNameError",
    "UntrainedWarning",
    "WeightsError",
    "WeightsNotFoundError",
    "require",
]


class DenseDinoError(Exception):
    """Root of every error that densedino raises on purpose."""


class InputError(DenseDinoError, ValueError):
    """A value, a name or a size that cannot be used."""


class UnknownNameError(InputError):
    """A name that is in no table."""

    def __init__(self, kind: str, value: object, valid: Iterable[str], *, hint: str = "") -> None:
        names = sorted(valid)
        near = difflib.get_close_matches(str(value), names, n=1, cutoff=0.5)
        message = f"unknown {kind} {value!r}"
        message += f"; did you mean {near[0]!r}?" if near else "."
        message += f" Valid: {', '.join(names)}."
        super().__init__(f"{message} {hint}".strip())


class ImageError(InputError):
    """A file or an array that is not a usable image."""


class WeightsError(DenseDinoError, RuntimeError):
    """A checkpoint that is not what it should be."""


class WeightsNotFoundError(WeightsError):
    """Weights that are not there, or not to be had without a step by the user."""


class DownloadError(WeightsError):
    """A download that gave something other than the whole, right file."""


class StateDictError(WeightsError):
    """Tensors that do not fit the architecture."""


class StoreError(DenseDinoError, RuntimeError):
    """A feature store that cannot be read or must not be written."""


class TrainingError(DenseDinoError, RuntimeError):
    """A run that cannot go on as it is."""


class MissingExtraError(DenseDinoError, ImportError):
    """An optional dependency that is not installed."""


class UntrainedWarning(UserWarning):
    """Nobody asked for random weights, and random they are."""


def require(module: str, *, extra: str, purpose: str) -> Any:
    """Import and return `module`, which ships with the pip extra `extra`.

    Raises:
        MissingExtraError: it is not installed; the message names the pip command.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"{purpose} needs {module.split('.')[0]!r}, which is not installed. Fix: pip install 'densedino[{extra}]'"
        ) from error
