"""Owns the shape of a pruned model in its file: the spec that stands in no table, as an entry of the metadata."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from densedino.config import from_dict, to_dict
from densedino.errors import InputError, StateDictError
from densedino.models.catalog import MODELS, ViTSpec, model_spec

if TYPE_CHECKING:
    from collections.abc import Mapping

    from densedino.models.catalog import ConvNeXtSpec

__all__ = ["pack_spec", "spec_of", "unpack_spec"]

_KEY = "densedino.spec"


def pack_spec(spec: ViTSpec | ConvNeXtSpec) -> dict[str, str]:
    """Metadata entries for a safetensors header; none for a row of the table."""
    return {} if MODELS.get(spec.name) == spec else {_KEY: json.dumps(to_dict(spec), sort_keys=True)}


def unpack_spec(metadata: Mapping[str, str]) -> ViTSpec | None:
    """Inverse of `pack_spec`; None for metadata without such an entry.

    Raises:
        StateDictError: an entry that is damaged, or of a newer densedino.
    """
    if _KEY not in metadata:
        return None
    try:
        return from_dict(ViTSpec, json.loads(metadata[_KEY]))
    except (ValueError, InputError) as error:
        raise StateDictError(f"the metadata entry {_KEY} cannot be read: {error}") from error


def spec_of(name: str, metadata: Mapping[str, str]) -> ViTSpec | ConvNeXtSpec:
    """The spec that a file has in its metadata, or else the table's row `name`."""
    return unpack_spec(metadata) or model_spec(name)
