"""Owns `load_weights`: from a name and a source to a strictly loaded module and its weights card."""

from __future__ import annotations

import functools
import hashlib
import importlib.resources
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from densedino.errors import InputError, WeightsNotFoundError
from densedino.models.catalog import MODELS, create_model
from densedino.weights import hub
from densedino.weights.card import WeightsCard
from densedino.weights.catalog import DEFAULT_WEIGHTS, IMAGENET_STATS, WEIGHTS, WeightsRecord
from densedino.weights.dialects import to_meta
from densedino.weights.files import Checkpoint, read_checkpoint, tensors_sha256
from densedino.weights.fitting import Fitted, fit
from densedino.weights.identity import Request, identify
from densedino.weights.kept import unpack_kept
from densedino.weights.packing import dense, unpack_state
from densedino.weights.shape import unpack_spec
from densedino.weights.sources import cached, download, first_sight
from densedino.weights.stored import Stored, locate
from densedino.weights.transfer import REQUEST_FORM, redact

if TYPE_CHECKING:
    from densedino.models.convnext import ConvNeXt
    from densedino.models.vit import VisionTransformer
    from densedino.weights.packing import Packed

__all__ = ["StoredModel", "load_stored", "load_weights", "read_weights"]

Weights = str | os.PathLike[str] | Mapping[str, Any] | None


def load_weights(
    name: str | None = None,
    *,
    weights: Weights = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> tuple[VisionTransformer | ConvNeXt, WeightsCard]:
    """Load a backbone strictly, whatever dialect its weights are in.

    Parameters are views of the mapped file: no page of it is read before it is needed, if it has more than 1 GiB. Then
    the card's hash is of a sample, and matrices are not searched for NaN (a run refuses features that are not finite).

    Args:
        name: of `list_weights()` or `list_models()`; None takes it from the weights.
        weights: a file or a Hugging Face folder, an https URL, a hub id (`facebook/…`, `timm/…`, `hf:owner/name`), a
            mapping of tensors, "random" (seeded by the model's name, untrained), or None: what is on this machine.
        device: where the module goes.
        dtype: of its parameters; that of the file if not given.

    Returns:
        The module in eval mode, and the card that says what it is, with its input statistics and licence.

    Raises:
        UnknownNameError: no such name.
        InputError: `weights` of no usable kind.
        WeightsNotFoundError: not here; the message lists the ways to get them.
        DownloadError: the download gave something else than the whole, right file.
        StateDictError: not these weights, not this architecture, or tensors that do not fit.
    """
    fitted, card = read_weights(name, weights=weights, thorough=False)
    model, card = _module(fitted, card)
    types = {parameter.dtype for parameter in model.parameters()}
    if dtype is None and len(types) > 1 and not _matrices_alone_are_bf16(model):
        dtype = functools.reduce(torch.promote_types, types)
        card = replace(card, notes=(*card.notes, f"parameters of several types, all cast to {str(dtype)[6:]}"))
    return model.to(device=device, dtype=dtype), card


@dataclass(frozen=True)
class StoredModel:
    """A backbone whose large tensors are still in their file."""

    model: VisionTransformer | ConvNeXt
    """Its parameters are views of the mapped file; those that the file has in another form are on the meta device."""
    tensors: Mapping[str, Stored | Packed]
    """Every parameter and buffer, by the name that the module has for it."""
    card: WeightsCard


def load_stored(name: str | None = None, *, weights: Weights = None) -> StoredModel:
    """Find a backbone's tensors without reading the large ones; otherwise as `load_weights`, and as strict.

    Raises:
        As `load_weights`.
    """
    fitted, card = read_weights(name, weights=weights, thorough=False, in_place=True)
    model, card = _module(fitted, card)
    whole = {key: value for key, value in model.state_dict().items() if key not in fitted.packed}
    places = locate({key: fitted.parts.get(key, (value,)) for key, value in whole.items()})
    return StoredModel(model, {**places, **fitted.packed}, card)


def _module(fitted: Fitted, card: WeightsCard) -> tuple[VisionTransformer | ConvNeXt, WeightsCard]:
    _say_once(card)
    state, dropped = fitted.module_state()
    model = create_model(fitted.spec, in_chans=fitted.in_chans, device="meta")
    model.load_state_dict(state, strict=True, assign=True)
    return model, card if card.source == "random" else replace(card, dropped=dropped)


def _matrices_alone_are_bf16(model: torch.nn.Module) -> bool:
    """As `pack_weights` writes them: engines take such a model without a copy of what is large."""
    matrices = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Linear)}
    return all(p.dtype == (torch.bfloat16 if id(p) in matrices else torch.float32) for p in model.parameters())


def read_weights(
    name: str | None, *, weights: Weights, thorough: bool = True, in_place: bool = False
) -> tuple[Fitted, WeightsCard]:
    """Find, read, translate, check and identify weights, without building the module. As `load_weights`.

    Args:
        name: as `load_weights` takes it.
        weights: likewise.
        thorough: hash all of the file and look at every number, also if it is large.
        in_place: leave in parts or packed what is so in the file (`Fitted.parts`, `Fitted.packed`).

    The card lists what does not survive the translation; `Fitted.module_state` adds what the module does not take.
    """
    request = Request.parse(name)
    if weights is None and request.name in (None, DEFAULT_WEIGHTS) and _embedded() is None:
        request, weights = Request.parse(DEFAULT_WEIGHTS), "random"
    if isinstance(weights, str) and weights == "random":
        return _random(request)
    checkpoint = _open(request, weights, thorough=thorough)
    state, packed = unpack_state(checkpoint.state, checkpoint.metadata)
    if not in_place:
        state, packed = {**state, **{key: dense(value) for key, value in packed.items()}}, {}
    translation = to_meta(state, join=not in_place)
    kept = unpack_kept(checkpoint.metadata)
    complete = thorough or not (in_place or checkpoint.large)
    spec = unpack_spec(checkpoint.metadata)
    fitted = replace(fit(translation, kept=kept, thorough=complete, elsewhere=packed, spec=spec), packed=packed)
    if isinstance(weights, Mapping):  # a module that shares memory with somebody's dict would change under them
        fitted = replace(fitted, tensors={key: value.detach().clone() for key, value in fitted.tensors.items()})
        checkpoint = replace(checkpoint, sha256=tensors_sha256(fitted.tensors))
    return fitted, identify(checkpoint, fitted, request)


def _open(request: Request, weights: Weights, *, thorough: bool) -> Checkpoint:
    if weights is None:
        return _local(request, thorough=thorough)
    if isinstance(weights, Mapping):
        return Checkpoint(weights, source="mapping", sha256="")
    if not isinstance(weights, str | os.PathLike):
        raise InputError(
            f"weights is a {type(weights).__name__}; valid are a path, an https URL, a hub id, a mapping of tensors, "
            "'random' or None."
        )
    text = os.fspath(weights)
    if text.startswith(("https://", "http://")):
        return read_checkpoint(download(text), source=redact(text), thorough=thorough)
    path = Path(text).expanduser()
    if (repository := hub.hub_id(text)) is not None and (":" in text or not path.exists()):
        return read_checkpoint(hub.fetch_snapshot(repository), source=f"hf:{repository}", thorough=thorough)
    return read_checkpoint(path, thorough=thorough)


def _local(request: Request, *, thorough: bool) -> Checkpoint:
    """What this machine has of the weights asked for: embedded, in our cache, in the hub's."""
    if request.name in (None, DEFAULT_WEIGHTS) and (path := _embedded()) is not None:
        return read_checkpoint(path, source="embedded")
    records = [request.record] if request.record else [r for r in WEIGHTS.values() if r.model == request.model]
    for record in records:
        if (path := cached(record.sha256)) is not None:
            return read_checkpoint(path, thorough=thorough)
        for repository in (record.huggingface, record.timm):
            if (path := hub.cached_snapshot(repository)) is not None:
                return read_checkpoint(path, source=f"hf:{repository}", thorough=thorough)
    raise _not_found(request, records[0] if records else None)


def _not_found(request: Request, record: WeightsRecord | None) -> WeightsNotFoundError:
    if record is None:
        return WeightsNotFoundError(
            f"there are no weights of {request.name}; pass some (weights='file.safetensors'), or weights='random' for "
            "untrained ones."
        )
    steps = [f"request a link at {REQUEST_FORM} and pass it in quotes (weights='https://…')"]
    steps.append(f"pass the file that you have (weights='{record.file}')")
    if record.timm:
        steps.append(f"pass weights='{record.timm}', timm's copy on the hub, which needs no request")
    if record.huggingface:
        steps.append(f"pass weights='{record.huggingface}' after accepting the licence there")
    steps.append("pass weights='random' for untrained ones, to try the software")
    numbered = "; ".join(f"({number}) {step}" for number, step in enumerate(steps, 1))
    return WeightsNotFoundError(
        f"the weights {record.name} are not on this machine; they are Meta's, under the {record.licence}, and not "
        f"shipped with densedino. Either {numbered}."
    )


def _embedded() -> Path | None:
    """The small weights in the package, if this build has them."""
    path = Path(str(importlib.resources.files("densedino.weights"))) / "embedded" / f"{DEFAULT_WEIGHTS}.safetensors"
    return path if path.is_file() else None


def _random(request: Request) -> tuple[Fitted, WeightsCard]:
    """Initialised weights that are the same on every machine, and leave the global generator as it was."""
    name = request.model or DEFAULT_WEIGHTS
    digest = hashlib.sha256(f"densedino:{name}".encode())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int.from_bytes(digest.digest()[:8], "big") >> 1)
        model = create_model(MODELS[name], device="cpu", dtype=torch.float32)
    mean, std = (request.record.mean, request.record.std) if request.record else IMAGENET_STATS
    return fit(to_meta(model.state_dict())), WeightsCard(
        name=name,
        model=name,
        source="random",
        sha256=digest.hexdigest(),
        mean=mean,
        std=std,
        in_chans=3,
        licence="Apache-2.0",
        licence_url="https://www.apache.org/licenses/LICENSE-2.0",
        data="nothing",
        dialect="densedino",
        untrained=True,
        notes=("untrained: random weights, features are noise",),
    )


def _say_once(card: WeightsCard) -> None:
    """Licence, and what had to be assumed, of content that is new to this machine."""
    if card.licence_url and card.licence != "Apache-2.0" and first_sight(card.sha256):
        print(f"densedino: {card.name} is under the {card.licence}: {card.licence_url} (shown once)", file=sys.stderr)
        for note in card.notes:
            print(f"densedino: {card.source}: {note}", file=sys.stderr)
