"""Owns the weights card: what is known about loaded weights, carried from the file to every output. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from densedino.errors import InputError

__all__ = ["WeightsCard"]

_TUPLES = {"mean": float, "std": float, "notes": str}


@dataclass(frozen=True, kw_only=True)
class WeightsCard:
    """Provenance, statistics and licence of one set of weights."""

    name: str
    """Row of the weights table (`vitl16-sat493m`), or the architecture's name if the weights are in no table."""
    model: str
    """Row of the architecture table."""
    source: str
    """Path, URL without its query, hub id, "embedded", "random" or "mapping"."""
    sha256: str
    """Of the file's content, or above 1 GiB of a sample of it (then `notes` says so); of the seed for random weights,
    of the tensors for a mapping."""
    mean: tuple[float, ...]
    """Per channel, in units of pixel values scaled to [0, 1]."""
    std: tuple[float, ...]
    in_chans: int
    licence: str
    licence_url: str
    data: str
    """What the weights were trained on, "nothing" for random ones, "unknown" if nothing tells."""
    dialect: str
    """How the file named its tensors: meta, huggingface, timm or densedino."""
    untrained: bool
    """True for random weights: features are noise."""
    dropped: tuple[tuple[str, str], ...] = ()
    """(key pattern, why) of every tensor of the file that the module did not take."""
    notes: tuple[str, ...] = ()
    """What was assumed or filled in, in words."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe: lists instead of tuples."""
        out = {field.name: getattr(self, field.name) for field in fields(self)}
        out.update({key: list(out[key]) for key in _TUPLES})
        out["dropped"] = [list(row) for row in self.dropped]
        return out

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> WeightsCard:
        """Inverse of `to_dict`.

        Raises:
            InputError: a field is missing, unknown or of another type.
        """
        known = {field.name for field in fields(cls)}
        required = known - {"dropped", "notes"}
        if not isinstance(values, Mapping):
            raise InputError(f"a weights card is a mapping, not a {type(values).__name__}.")
        if missing := sorted(required - values.keys()):
            raise InputError(f"weights card without {', '.join(missing)}; it must have {', '.join(sorted(required))}.")
        if unknown := sorted(values.keys() - known):
            raise InputError(f"weights card with unknown fields {', '.join(unknown)}; written by a newer densedino?")
        try:
            converted = {key: tuple(map(kind, values[key])) for key, kind in _TUPLES.items() if key in values}
            rows = tuple((str(pattern), str(why)) for pattern, why in values.get("dropped", ()))
        except (TypeError, ValueError) as error:
            raise InputError(
                f"weights card with a malformed list: {error}. Write it with WeightsCard.to_dict()."
            ) from error
        return cls(**{**values, **converted, "dropped": rows})
