"""Owns reading the file of a released head: found, told from others, strictly fitted; with its backbone if that is in.

What does not fit is named: another head, a backbone, files that were swapped.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from densedino.errors import StateDictError, WeightsError, WeightsNotFoundError
from densedino.heads.catalog import HEADS, create_head
from densedino.weights.dialects import to_meta
from densedino.weights.files import Checkpoint, tensors_sha256
from densedino.weights.fitting import infer_spec
from densedino.weights.identity import Request
from densedino.weights.loading import _open
from densedino.weights.sources import cached, first_sight
from densedino.weights.transfer import REQUEST_FORM

if TYPE_CHECKING:
    import os

    from densedino.heads.catalog import HeadSpec

__all__ = ["HeadFile", "describe", "read_head"]

_WRAPPERS = ("model", "state_dict")
_ALIASES = ("transformer.decoder.class_embed.", "transformer.decoder.bbox_embed.")
_LIMIT = 1 << 28  # numbers; larger files are not read merely to look for NaN


@dataclass(frozen=True)
class HeadFile:
    """A head's tensors, which fit it to the last key, and what came with them."""

    spec: HeadSpec
    tensors: dict[str, Tensor]
    source: str
    sha256: str
    """As of a weights card."""
    backbone: dict[str, Tensor] = field(default_factory=dict)
    """Of a joint file, under the backbone's own names."""
    notes: tuple[str, ...] = ()

    @property
    def untrained(self) -> bool:
        """True for random weights: answers are noise."""
        return self.source == "random"

    def module(self) -> nn.Module:
        """The head in eval mode; its parameters are views of the mapped file."""
        head = create_head(self.spec, device="meta")
        head.load_state_dict(self.tensors, strict=True, assign=True)
        return head.requires_grad_(False)


def read_head(spec: HeadSpec, *, weights: str | os.PathLike[str] | Mapping[str, Any] | None = None) -> HeadFile:
    """Find and read a head's file, and fit it strictly.

    Args:
        spec: row of the table of heads.
        weights: a path, an https:// URL, a mapping of tensors, "random" for seeded random weights, or None for a file
            of the release that is in the cache.

    Raises:
        WeightsNotFoundError: no such file, or none given and none in the cache; the message says how to get it.
        StateDictError: the file holds something else: the message says what, and what would fit.
    """
    if isinstance(weights, str) and weights == "random":
        return _random(spec)
    checkpoint = _find(spec, weights)
    tensors = _tensors(checkpoint.state)
    backbone, own = _parted(spec, tensors)
    _check(spec, own, checkpoint.source, whole=tensors)
    sha256 = checkpoint.sha256 or tensors_sha256(own)
    notes: tuple[str, ...] = ()
    if spec.sha256 and not sha256.startswith(spec.sha256):
        notes = (f"{checkpoint.source}: not compared with the released {spec.file}, or not equal to it",)
    if spec.licence != "Apache-2.0" and first_sight(sha256):
        print(f"densedino: {spec.name} is under the {spec.licence}: {spec.licence_url} (shown once)", file=sys.stderr)
    return HeadFile(spec, own, checkpoint.source, sha256, backbone, notes)


def _find(spec: HeadSpec, weights: Any) -> Checkpoint:
    if weights is not None:
        return _open(Request(), weights, thorough=False)
    if spec.sha256 and (path := cached(spec.sha256)) is not None:
        return _open(Request(), path, thorough=False)
    raise WeightsNotFoundError(
        f"the head {spec.name} is not on this machine"
        + (
            f"; it is Meta's, under the {spec.licence}, and not shipped with densedino. Either (1) request a link at "
            f"{REQUEST_FORM} and pass it in quotes (weights='https://…'); (2) pass the file that you have "
            f"(weights='{spec.file}'); "
            if spec.file
            else ", and none was released. Either (1) pass the file that you have (weights='head.pth'); "
        )
        + "or pass weights='random' for an untrained one, to try the software."
    )


def _random(spec: HeadSpec) -> HeadFile:
    """Initialised weights that are the same on every machine, and leave the global generator as it was."""
    digest = hashlib.sha256(f"densedino:{spec.name}".encode())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int.from_bytes(digest.digest()[:8], "big") >> 1)
        head = create_head(spec)
    tensors = {key: value.detach() for key, value in head.state_dict().items()}
    return HeadFile(
        spec, tensors, "random", digest.hexdigest(), notes=("untrained: random weights, answers are noise",)
    )


def _tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a checkpoint: itself, or what stands under `model`; without a data-parallel wrapper's prefix."""
    for name in _WRAPPERS:
        if isinstance(state.get(name), Mapping):
            state = state[name]
    return {str(key).removeprefix("module."): value for key, value in state.items() if isinstance(value, Tensor)}


def _parted(spec: HeadSpec, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(the backbone's tensors, the head's), under their own names."""
    prefix = spec.backbone_prefix
    backbone = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    own = {
        key.removeprefix(spec.head_prefix): value
        for key, value in tensors.items()
        if not key.startswith(prefix) and not (spec.task == "detect" and key.startswith(_ALIASES))
    }
    return backbone, own


def _check(spec: HeadSpec, own: Mapping[str, Tensor], source: str, *, whole: Mapping[str, Tensor]) -> None:
    wanted = {key: tuple(value.shape) for key, value in create_head(spec, device="meta").state_dict().items()}
    missing, unexpected = sorted(wanted.keys() - own.keys()), sorted(own.keys() - wanted.keys())
    shapes = [key for key in sorted(wanted.keys() & own.keys()) if tuple(own[key].shape) != wanted[key]]
    if missing or unexpected or shapes:
        if (found := describe(whole)) is not None:
            raise StateDictError(f"{spec.name!r} was asked for, but {source} holds {found}. {_advice(spec, found)}")
        counts = (
            f"{len(missing)} tensors are missing, {len(unexpected)} are not the head's, {len(shapes)} have other shapes"
        )
        first = (
            f"{shapes[0]} is {tuple(own[shapes[0]].shape)}, not {wanted[shapes[0]]}"
            if shapes
            else f"missing is {missing[0]}"
            if missing
            else f"unexpected is {unexpected[0]}"
        )
        raise StateDictError(
            f"{source} does not hold the head {spec.name!r}: {counts}; {first}. It was cut, changed, or is of another "
            f"model. What would fit is {spec.file or 'a state dict of that head'}."
        )
    if sum(value.numel() for value in own.values()) < _LIMIT:
        bad = [key for key, value in own.items() if value.is_floating_point() and not torch.isfinite(value.sum())]
        if bad:
            raise StateDictError(f"{source}: {bad[0]} holds NaN or infinity; the file is damaged. Get it again.")


def _advice(spec: HeadSpec, found: str) -> str:
    if found.startswith("the head"):
        return f"Ask for {found.split()[2]}, or pass the file of {spec.name} ({spec.file or 'its own'})."
    return (
        f"Pass it as backbone_weights=, and as weights= the head's file ({spec.file or 'its own'}): perhaps the two "
        "were swapped."
    )


def describe(tensors: Mapping[str, Any]) -> str | None:
    """What a checkpoint is, in words: "the head 'name'", "a backbone, vitl16"; None if it is neither."""
    flat = _tensors(tensors)
    for spec in HEADS.values():
        _, own = _parted(spec, flat)
        wanted = create_head(spec, device="meta").state_dict()
        if own.keys() == wanted.keys() and all(own[key].shape == wanted[key].shape for key in wanted):
            return f"the head {spec.name!r}"
    try:
        backbone, _ = infer_spec(to_meta(tensors).tensors)
    except WeightsError:
        return None
    return f"a backbone, {backbone.name}"
