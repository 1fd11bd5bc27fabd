"""Owns whose weights these are: from the content and everything that speaks for it to a weights card.

Decisive, in this order: the file's hash, our own metadata in it, the official repository it came from. Otherwise all
that speaks must agree: the preprocessor beside the file, the name asked for, the file's name, tensors only SAT has.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from densedino.errors import StateDictError, UnknownNameError
from densedino.models.catalog import MODELS, ConvNeXtSpec
from densedino.weights.card import WeightsCard
from densedino.weights.catalog import IMAGENET_STATS, SAT493M_STATS, WEIGHTS, WeightsRecord

if TYPE_CHECKING:
    from collections.abc import Mapping

    from densedino.weights.files import Checkpoint
    from densedino.weights.fitting import Fitted

__all__ = ["CARD_KEY", "Request", "identify"]

CARD_KEY = "densedino.card"
"""Key of a file's metadata under which our converter writes the weights card as JSON."""
_SAMPLED = "the file is large, so its content was not verified: sha256 is of a sample of it, and no NaN was looked for"
_TAGS = {"lvd1689m": ("LVD-1689M", IMAGENET_STATS), "sat493m": ("SAT-493M", SAT493M_STATS)}


@dataclass(frozen=True)
class Request:
    """What the user asked for by name: an architecture, weights, or nothing."""

    name: str | None = None
    model: str | None = None
    record: WeightsRecord | None = None

    @classmethod
    def parse(cls, name: str | None) -> Request:
        """Look a name up in both tables.

        Raises:
            UnknownNameError: it is in neither; the message names the nearest.
        """
        if name is None:
            return cls()
        if name in WEIGHTS:
            return cls(name, WEIGHTS[name].model, WEIGHTS[name])
        if name in MODELS:
            return cls(name, name)
        raise UnknownNameError("weights or model", name, [*WEIGHTS, *MODELS])


def identify(checkpoint: Checkpoint, fitted: Fitted, request: Request) -> WeightsCard:
    """The card of a checkpoint whose tensors fit `fitted.spec`.

    Raises:
        StateDictError: the file is not what was asked for, or what speaks for its origin disagrees.
    """
    model = fitted.spec.name
    if request.model is not None and request.model != model:
        ask = f"Ask for {model!r}, or leave" if model in MODELS else "Leave"
        raise StateDictError(
            f"{request.name!r} was asked for, but {checkpoint.source} holds {model}. {ask} the name out: it is then "
            "taken from the file."
        )
    if fitted.dialect == "meta":  # those two files beside it are of other software, so of other weights
        checkpoint = replace(checkpoint, config={}, preprocessor={})
    _check_config(checkpoint, fitted)
    if (record := _record_of(checkpoint)) is not None:
        return _from_record(record, checkpoint, fitted, request)
    if CARD_KEY in checkpoint.metadata:
        return _from_own_metadata(checkpoint, fitted, request)
    return _from_claims(checkpoint, fitted, request)


def _record_of(checkpoint: Checkpoint) -> WeightsRecord | None:
    """The table's row that the content's hash, or the official repository, belongs to."""
    repository = _repository(checkpoint.source)
    for record in WEIGHTS.values():
        stem, _, tag = (record.timm or "").rpartition(".")
        if checkpoint.sha256.startswith(record.sha256):
            return record
        if repository is not None and repository in (record.huggingface, record.timm, f"{stem}_qkvb.{tag}"):
            return record
    return None


def _repository(source: str) -> str | None:
    """The hub repository that a source is, or in whose folder of the hub's cache it lies."""
    if source.startswith("hf:"):
        return source.removeprefix("hf:").partition("@")[0]
    folders = [part.split("--") for part in PurePath(source).parts if part.startswith("models--")]
    return "/".join(folders[-1][1:]) if folders else None


def _card(checkpoint: Checkpoint, fitted: Fitted, identity: Mapping[str, Any]) -> WeightsCard:
    base = {
        "model": fitted.spec.name,
        "source": checkpoint.source,
        "sha256": checkpoint.sha256,
        "in_chans": fitted.in_chans,
        "dialect": fitted.dialect,
        "untrained": False,
        "dropped": fitted.dropped,
        "notes": fitted.notes,
    }
    card = WeightsCard(**{**base, **identity})
    return replace(card, notes=(*card.notes, _SAMPLED)) if checkpoint.sampled else card


def _from_record(record: WeightsRecord, checkpoint: Checkpoint, fitted: Fitted, request: Request) -> WeightsCard:
    if record.model != fitted.spec.name:
        raise StateDictError(
            f"{checkpoint.source} is known as {record.name}, but holds the tensors of {fitted.spec.name}."
        )
    if request.record is not None and request.record != record:
        raise StateDictError(
            f"{request.name!r} was asked for, but {checkpoint.source} is {record.name}, which needs other input "
            f"statistics. Ask for {record.name!r}, or leave the name out."
        )
    keys = ("name", "mean", "std", "licence", "licence_url", "data")
    return _card(checkpoint, fitted, {key: getattr(record, key) for key in keys})


def _from_own_metadata(checkpoint: Checkpoint, fitted: Fitted, request: Request) -> WeightsCard:
    try:
        written = WeightsCard.from_dict(json.loads(checkpoint.metadata[CARD_KEY]))
    except ValueError as error:  # of JSON, and InputError
        raise StateDictError(
            f"{checkpoint.source}: the weights card in its metadata cannot be read: {error}"
        ) from error
    if (written.model, written.in_chans) != (fitted.spec.name, fitted.in_chans):
        raise StateDictError(
            f"{checkpoint.source}: its metadata says {written.model} with {written.in_chans} channels, its tensors are "
            f"of {fitted.spec.name} with {fitted.in_chans}. It was changed after it was written; convert the original."
        )
    asked = request.record
    if asked is not None and (written.mean, written.std) != (asked.mean, asked.std):
        raise StateDictError(
            f"{asked.name!r} was asked for, but {checkpoint.source} says of itself that it is {written.name}, which "
            f"needs other input statistics. Ask for {written.name!r}, or leave the name out."
        )
    found = (*fitted.notes, _SAMPLED) if checkpoint.sampled else fitted.notes
    return replace(
        written,
        source=checkpoint.source,
        sha256=checkpoint.sha256,
        dialect=written.dialect if fitted.dialect == "meta" else fitted.dialect,
        dropped=fitted.dropped,
        notes=(*written.notes, *(note for note in found if note not in written.notes)),
    )


def _from_claims(checkpoint: Checkpoint, fitted: Fitted, request: Request) -> WeightsCard:
    stats, claims = _given_stats(checkpoint), _claims(checkpoint, fitted, request)
    tag = claims[0][1] if claims else None
    for by, other in claims[1:]:
        if other != tag:
            raise StateDictError(
                f"{checkpoint.source}: {claims[0][0]} says {_TAGS[claims[0][1]][0]}, {by} says {_TAGS[other][0]}. They "
                "need different input statistics, so one gives wrong features. Correct or remove the one that is wrong."
            )
    notes = list(fitted.notes)
    if (record := WEIGHTS.get(f"{fitted.spec.name}-{tag}")) is not None:
        data, licence, licence_url = record.data, record.licence, record.licence_url
        differs = "not compared with it" if checkpoint.sampled else "but of other content"
        like = f"named like the released {record.file}, {differs}"
        what = like if checkpoint.file_name == record.file else "not a released file"
        notes.append(f"{what}; taken for {record.name} or derived from it because of {claims[0][0]}")
    else:
        timm = checkpoint.config.get("pretrained_cfg", {})
        data, licence, licence_url = str(timm.get("tag", "unknown")), str(timm.get("license", "unknown")), ""
        if tag is None and stats is None and fitted.in_chans == 3:
            notes.append(
                "nothing says what these weights were trained on: ImageNet mean and std assumed, as for LVD-1689M"
            )
    stats = stats or (_TAGS[tag or "lvd1689m"][1])
    if len(stats[0]) != fitted.in_chans:
        stats = ((0.0,) * fitted.in_chans, (1.0,) * fitted.in_chans)
        notes.append(f"no mean and std are known for {fitted.in_chans} channels: 0 and 1, that is, values as they come")
    identity = {
        "name": record.name if record else fitted.spec.name,
        "mean": tuple(stats[0]),
        "std": tuple(stats[1]),
        "licence": licence,
        "licence_url": licence_url,
        "data": data,
        "notes": tuple(notes),
    }
    return _card(checkpoint, fitted, identity)


def _given_stats(checkpoint: Checkpoint) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and std of transformers' preprocessor_config.json, or timm's config.json."""
    timm = checkpoint.config.get("pretrained_cfg", {})
    for source, mean, std in ((checkpoint.preprocessor, "image_mean", "image_std"), (timm, "mean", "std")):
        if mean in source and std in source:
            return tuple(map(float, source[mean])), tuple(map(float, source[std]))
    return None


def _claims(checkpoint: Checkpoint, fitted: Fitted, request: Request) -> list[tuple[str, str]]:
    """(who says it, data tag), in the order of their weight."""
    claims = []
    stats = _given_stats(checkpoint)
    known = {values: tag for tag, (_, values) in _TAGS.items()}
    if stats in known and (stats != IMAGENET_STATS or "pretrained_cfg" not in checkpoint.config):
        claims.append(("the mean and std in the configuration beside it", known[stats]))
    if request.record is not None:
        claims.append((f"the name asked for, {request.name!r},", request.record.name.rpartition("-")[2]))
    for name in (
        str(checkpoint.config.get("_name_or_path", "")),
        PurePath(checkpoint.source).name,
        checkpoint.file_name,
    ):
        if match := re.search(r"(?<!eupe_)(lvd1689m|sat493m)", name.lower()):
            claims.append((f"the file name {name!r}", match[1]))
    if fitted.spec.name == "vitl16" and "local_cls_norm.weight" in fitted.tensors:
        claims.append(("local_cls_norm among its tensors, which of the ViT-L only SAT has,", "sat493m"))
    return claims


def _check_config(checkpoint: Checkpoint, fitted: Fitted) -> None:
    """What transformers' config.json says of the arithmetic must be what the table says."""
    config: Mapping[str, Any] = checkpoint.config
    if not str(config.get("model_type", "")).startswith("dinov3"):
        return
    spec = fitted.spec
    expected: dict[str, Any] = {"layer_norm_eps": spec.norm_eps}
    if isinstance(spec, ConvNeXtSpec):
        expected["hidden_act"] = "gelu"
    else:
        expected |= {"num_attention_heads": spec.num_heads, "rope_theta": spec.rope_base}
        expected["hidden_act"] = "gelu" if spec.ffn == "mlp" else "silu"
    differing = [
        f"{key} {config[key]} instead of {value}" for key, value in expected.items() if config.get(key, value) != value
    ]
    if differing:
        raise StateDictError(
            f"{checkpoint.source}: its config.json describes another model than {spec.name}: {', '.join(differing)}. "
            "Its tensors would load, and its features would be wrong."
        )
