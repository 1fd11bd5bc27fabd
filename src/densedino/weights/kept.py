"""Owns what a dialect has no place for and a conversion must not lose: a few small tensors in the file's metadata."""

from __future__ import annotations

import base64
import binascii
from typing import TYPE_CHECKING

from densedino.errors import StateDictError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

__all__ = ["pack_kept", "unpack_kept"]

_KEY = "densedino.kept"


def pack_kept(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Metadata entries for a safetensors header (base64 of a safetensors file); none for no tensors."""
    from safetensors.torch import save

    contiguous = {key: value.contiguous() for key, value in tensors.items()}
    return {_KEY: base64.b64encode(save(contiguous)).decode("ascii")} if contiguous else {}


def unpack_kept(metadata: Mapping[str, str]) -> dict[str, Tensor]:
    """Inverse of `pack_kept`; {} for metadata without such an entry.

    Raises:
        StateDictError: an entry that is damaged.
    """
    if _KEY not in metadata:
        return {}
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors: dict[str, Tensor] = load(base64.b64decode(metadata[_KEY], validate=True))
        return tensors
    except (binascii.Error, SafetensorError) as error:
        raise StateDictError(f"the metadata entry {_KEY} is damaged ({error}); convert the original again.") from error
