"""Owns the cache of compiled graphs, keyed by content: `<cache>/engines/<digest>/`, each made once and whole."""

from __future__ import annotations

import hashlib
import json
import shutil
from typing import TYPE_CHECKING

from densedino.checkpoint import atomic_path
from densedino.weights.files import tensors_sha256
from densedino.weights.sources import cache_dir

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from torch import nn

__all__ = ["artefact", "model_digest", "model_state"]


def model_digest(model: nn.Module) -> str:
    """SHA-256 of all that a model's numbers depend on: its spec, and every tensor's bytes."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return hashlib.sha256(f"{model.spec!r} {tensors_sha256(tensors)}".encode()).hexdigest()


def model_state(model: nn.Module) -> tuple[tuple[int, int], ...]:
    """Changes whenever a parameter is replaced or written to: microseconds, where `model_digest` takes seconds."""
    tensors = (*model.parameters(), *model.buffers())
    return tuple((tensor.data_ptr(), tensor._version) for tensor in tensors)


def artefact(key: Mapping[str, object], make: Callable[[Path], None]) -> Path:
    """The folder that `make` fills for `key`, from the cache or made now.

    Processes that want the same one wait for the first; a killed one leaves nothing that is taken for whole.

    Args:
        key: all that the content depends on, JSON-safe: digests, versions, options.
        make: fills the empty folder it is given.
    """
    from filelock import FileLock

    text = json.dumps(dict(key), sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:32]
    folder = cache_dir() / "engines" / digest
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f"{digest}.lock"):
        if not folder.is_dir():
            for stale in folder.parent.glob(f".{digest}.*.tmp"):  # of a process that was killed
                shutil.rmtree(stale, ignore_errors=True)
            with atomic_path(folder, directory=True) as scratch:
                make(scratch)
                (scratch / "key.json").write_text(text + "\n", encoding="utf-8")
    return folder
