"""Owns the strict fit of tensors to the architecture table: which row it is, that nothing is missing, odd or silent.

Input is under Meta's names (`densedino.weights.dialects`). Everything not taken is listed with the reason; everything
that is neither taken nor understood is an error.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from densedino.errors import StateDictError
from densedino.models.catalog import MODELS, ConvNeXtSpec, ViTSpec, create_model
from densedino.models.rope import rope_periods
from densedino.weights.dialects import likely_cause, patterns

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Mapping

    from densedino.weights.dialects import Dialect, Translation
    from densedino.weights.packing import Packed

__all__ = ["Fitted", "fit", "infer_spec"]

Spec = ViTSpec | ConvNeXtSpec
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_HEADS = ("head.", "dino_head.", "ibot_head.", "fc_norm.", "linear_head.")
_KEY_BIAS = re.compile(r"blocks\.\d+\.attn\.qkv\.bias")
_SMALL = 1 << 18  # bytes: norms, biases, tokens, but no matrix of a large model


@dataclass(frozen=True)
class Fitted:
    """Tensors that are, to the last key, those of `spec`."""

    spec: Spec
    in_chans: int
    dialect: Dialect
    tensors: dict[str, Tensor]
    """Under Meta's names, complete: what a Meta file of this architecture holds, but for the doubled ConvNeXt norm."""
    dropped: tuple[tuple[str, str], ...]
    """(key pattern, why) of what is in the file and not in `tensors`."""
    remade: tuple[tuple[str, str], ...]
    """(key pattern, why) of what the module computes itself instead of taking it from the file."""
    notes: tuple[str, ...]
    parts: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)
    """Of tensors that stand empty in `tensors` (device meta): what is to be joined along the first dimension."""
    packed: dict[str, Packed] = field(default_factory=dict)
    """Of tensors that stand empty in `tensors`: integers and their scales."""

    def module_state(self) -> tuple[dict[str, Tensor], tuple[tuple[str, str], ...]]:
        """The state dict that our module takes strictly, and all that was dropped on the way to it."""
        state, dropped = dict(self.tensors), [*self.dropped, *self.remade]
        if isinstance(self.spec, ViTSpec):
            if not self.spec.local_cls_norm and state.pop("local_cls_norm.weight", None) is not None:
                del state["local_cls_norm.bias"]
                dropped.append(("local_cls_norm.*", "used in training only"))
            if any(_key_third(value).count_nonzero() for key, value in state.items() if _KEY_BIAS.fullmatch(key)):
                dropped.append(("blocks.*.attn.qkv.bias", "key part: masked to zero by bias_mask"))
            state |= {key: _without_key(value) for key, value in state.items() if _KEY_BIAS.fullmatch(key)}
            state["rope_embed.periods"] = rope_periods(self.spec.head_dim, self.spec.rope_base)
        return state, tuple(dropped)


def fit(
    translation: Translation,
    *,
    kept: Mapping[str, Tensor] | None = None,
    thorough: bool = True,
    elsewhere: Iterable[str] = (),
    spec: Spec | None = None,
) -> Fitted:
    """Check a backbone's tensors against the architecture table.

    Args:
        translation: of `dialects.to_meta`.
        kept: tensors that the dialect has no place for and that our own converter carried along in the metadata.
        thorough: look at every number; otherwise only at small tensors, so that a large file is not read for it.
        elsewhere: tensors that are on the meta device because their numbers are kept in another form.
        spec: of the file itself, where it is pruned and so in no table.

    Raises:
        StateDictError: no such architecture; keys or shapes that do not fit; NaN or infinity; RoPE periods of another
            base; a key bias that is not masked.
    """
    tensors = dict(translation.tensors) | dict(kept or {})
    dropped, notes, remade = list(translation.dropped), list(translation.notes), []
    dropped += _drop_heads(tensors) + _drop_doubled_norm(tensors)
    spec, in_chans = infer_spec(tensors) if spec is None else (spec, _channels(tensors))
    _check_values(tensors, thorough=thorough, elsewhere={*translation.parts, *elsewhere})
    if isinstance(spec, ViTSpec):
        dropped += _drop_zero_bias(tensors, spec)
        remade = _check_masks(tensors, trusted=kept or ()) + _check_periods(tensors, spec)
        notes += _fill(tensors, spec)
    _check_keys(tensors, spec, in_chans)
    return Fitted(
        spec,
        in_chans,
        translation.dialect,
        tensors,
        tuple(dropped),
        tuple(remade),
        tuple(notes),
        parts=translation.parts,
    )


def infer_spec(tensors: Mapping[str, Tensor]) -> tuple[Spec, int]:
    """Row of the architecture table that these tensors (Meta's names) belong to, and the input channels.

    Raises:
        StateDictError: no row; the message names the nearest and what differs.
    """
    try:
        facts, stem = _vit_facts(tensors) if "patch_embed.proj.weight" in tensors else _convnext_facts(tensors)
    except (KeyError, IndexError) as error:
        cause = likely_cause(tensors)
        raise StateDictError(f"without {error} the architecture cannot be told. {cause}".rstrip()) from None
    same_kind = [spec for spec in MODELS.values() if isinstance(spec, ViTSpec) == ("embed_dim" in facts)]
    differing = {spec.name: [key for key, value in facts.items() if getattr(spec, key) != value] for spec in same_kind}
    spec = min(same_kind, key=lambda row: len(differing[row.name]))
    if differences := differing[spec.name]:
        described = ", ".join(f"{key} {value}" for key, value in facts.items())
        table = ", ".join(f"{key} {getattr(spec, key)}" for key in differences)
        raise StateDictError(
            f"no architecture in the table has {described}. The nearest is {spec.name}, which differs by {table}. "
            f"{likely_cause(tensors)}".rstrip()
        )
    return spec, stem.shape[1]


def _channels(tensors: Mapping[str, Tensor]) -> int:
    stem = tensors.get("patch_embed.proj.weight", tensors.get("downsample_layers.0.0.weight"))
    return 3 if stem is None else stem.shape[1]  # without it, what is missing is said by name


def _vit_facts(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], Tensor]:
    stem = tensors["patch_embed.proj.weight"]
    gated = "blocks.0.mlp.w1.weight" in tensors
    hidden = tensors["blocks.0.mlp.w1.weight" if gated else "blocks.0.mlp.fc1.weight"]
    registers = tensors.get("storage_tokens")
    return {
        "embed_dim": stem.shape[0],
        "depth": _count(tensors, r"blocks\.(\d+)\."),
        "hidden_dim": hidden.shape[0],
        "ffn": "swiglu" if gated else "mlp",
        "num_register_tokens": 0 if registers is None else registers.shape[1],
        "patch_size": stem.shape[-1],
    }, stem


def _convnext_facts(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], Tensor]:
    stem = tensors["downsample_layers.0.0.weight"]
    return {
        "depths": tuple(_count(tensors, rf"stages\.{i}\.(\d+)\.") for i in range(4)),
        "dims": (stem.shape[0], *(tensors[f"downsample_layers.{i}.1.weight"].shape[0] for i in (1, 2, 3))),
    }, stem


def _count(tensors: Iterable[str], pattern: str) -> int:
    return max((int(match[1]) + 1 for key in tensors if (match := re.match(pattern, key))), default=0)


def _drop_heads(tensors: dict[str, Tensor]) -> list[tuple[str, str]]:
    gone = [key for key in tensors if key.startswith(_HEADS)]
    for key in gone:
        del tensors[key]
    return [(f"{top}.*", "a head, not the backbone") for top in dict.fromkeys(key.split(".")[0] for key in gone)]


def _drop_doubled_norm(tensors: dict[str, Tensor]) -> list[tuple[str, str]]:
    """Drop Meta's second copy of a ConvNeXt's final norm."""
    for kind in ("weight", "bias"):
        copy, norm = tensors.get(f"norms.3.{kind}"), tensors.get(f"norm.{kind}")
        if copy is not None and norm is not None and not torch.equal(copy, norm):
            raise StateDictError(
                f"norms.3.{kind} and norm.{kind} differ; in Meta's ConvNeXt they are one tensor stored twice, so one "
                "of them has been changed. Save the checkpoint from a module in which they are tied."
            )
    if tensors.pop("norms.3.weight", None) is None:
        return []
    tensors.pop("norms.3.bias", None)
    return [("norms.3.*", "second copy of norm.*, and equal to it")]


def _check_values(tensors: Mapping[str, Tensor], *, thorough: bool, elsewhere: Container[str]) -> None:
    odd = [
        f"{key} ({value.dtype})".replace("torch.", "") for key, value in tensors.items() if value.dtype not in _FLOATS
    ]
    if odd:
        raise StateDictError(
            f"tensors that are not floating point: {_some(odd)}. A quantised or packed checkpoint cannot be loaded; "
            "use the original weights."
        )
    if empty := [key for key, value in tensors.items() if value.device.type == "meta" and key not in elsewhere]:
        raise StateDictError(f"tensors without data (device meta): {_some(empty)}. Pass a materialised state dict.")
    looked_at = {key: value for key, value in tensors.items() if thorough or value.nbytes <= _SMALL}
    bad = [key for key, value in looked_at.items() if not key.endswith(".bias_mask") and not _finite(value)]
    if bad:
        raise StateDictError(
            f"NaN or infinity in {_some(bad)}. Training diverged, or the file is damaged; use an earlier checkpoint or "
            "get the file again."
        )


def _finite(value: Tensor) -> bool:
    if value.numel() == 0 or value.device.type == "meta":
        return True
    low, high = torch.aminmax(value.detach())  # NaN wins in both
    return bool(torch.isfinite(low) and torch.isfinite(high))


def _check_masks(tensors: dict[str, Tensor], *, trusted: Container[str]) -> list[tuple[str, str]]:
    """Take off every `bias_mask` that is as it should be, or NaN as in files saved before initialisation.

    Biases in `trusted` had a right mask when our converter read them.
    """
    masks = {key: tensors.pop(key) for key in list(tensors) if key.endswith(".attn.qkv.bias_mask")}
    for key, mask in masks.items():
        expected = torch.ones_like(mask)
        _key_third(expected).zero_()
        if not (mask.isnan().all() or torch.equal(mask, expected)):
            raise StateDictError(f"{key} is not ones, zeros, ones for query, key, value: this is another model.")
    for key, bias in tensors.items():
        if not _KEY_BIAS.fullmatch(key) or f"{key}_mask" in masks or key in trusted:
            continue
        if _key_third(bias).count_nonzero():
            raise StateDictError(
                f"{key} has a key part that is not zero and no {key}_mask beside it: a model trained without "
                "mask_k_bias. DINOv3's has none, so the features would differ."
            )
    return [("blocks.*.attn.qkv.bias_mask", "its values are known; made anew")] if masks else []


def _check_periods(tensors: dict[str, Tensor], spec: ViTSpec) -> list[tuple[str, str]]:
    stored = tensors.get("rope_embed.periods")
    if stored is None:
        return []
    exact = rope_periods(spec.head_dim, spec.rope_base)
    # bfloat16 keeps 8 significant bits, so rounding moves a value by at most 2**-9 of it; twice that is allowed.
    if stored.shape != exact.shape or not torch.allclose(stored.float().cpu(), exact, rtol=2**-8, atol=0.0):
        raise StateDictError(
            f"rope_embed.periods are {_head(stored)}, but {spec.name} has {_head(exact)}, from base {spec.rope_base:g} "
            f"and head size {4 * exact.numel()}. A model with another RoPE base or number of heads "
            "would give wrong features without any other sign."
        )
    return [("rope_embed.periods", "recomputed in float32; the file's are right up to bfloat16 rounding")]


def _head(periods: Tensor) -> str:
    return f"{[round(value, 4) for value in periods.flatten()[:4].tolist()]}… ({periods.numel()} of them)"


def _drop_zero_bias(tensors: dict[str, Tensor], spec: ViTSpec) -> list[tuple[str, str]]:
    biases = [key for key in tensors if _KEY_BIAS.fullmatch(key)]
    if spec.qkv_bias or not biases:
        return []
    if any(tensors[key].count_nonzero() for key in biases):
        raise StateDictError(f"blocks.*.attn.qkv.bias is in the file and not zero, but {spec.name} has no qkv bias.")
    for key in biases:
        del tensors[key]
    return [("blocks.*.attn.qkv.bias", f"all zero, and {spec.name} has none")]


def _fill(tensors: dict[str, Tensor], spec: ViTSpec) -> list[str]:
    """Add what dialects leave out because inference does not need it; say so where it is not plain arithmetic."""
    notes = []
    like = tensors["patch_embed.proj.weight"]
    if "mask_token" not in tensors:
        tensors["mask_token"] = like.new_zeros(1, spec.embed_dim)
        notes.append("mask_token is not in the file: zeros (only pretraining uses it)")
    if spec.local_cls_norm and not any(key.startswith("local_cls_norm.") for key in tensors):
        tensors["local_cls_norm.weight"] = like.new_ones(spec.embed_dim)
        tensors["local_cls_norm.bias"] = like.new_zeros(spec.embed_dim)
        notes.append("local_cls_norm is not in the file: identity (only pretraining uses it)")
    if spec.qkv_bias and not any(_KEY_BIAS.fullmatch(key) for key in tensors):
        for i in range(spec.depth):
            tensors[f"blocks.{i}.attn.qkv.bias"] = like.new_zeros(3 * spec.embed_dim)
        notes.append("blocks.*.attn.qkv.bias is not in the file: zeros, as in every released model of this dialect")
    for key in [key for key in tensors if _KEY_BIAS.fullmatch(key)]:
        tensors[f"{key}_mask"] = torch.ones_like(tensors[key])
        _key_third(tensors[f"{key}_mask"]).zero_()
    tensors.setdefault("rope_embed.periods", rope_periods(spec.head_dim, spec.rope_base))
    return notes


def _check_keys(tensors: Mapping[str, Tensor], spec: Spec, in_chans: int) -> None:
    expected = {
        key: value.shape for key, value in create_model(spec, in_chans=in_chans, device="meta").state_dict().items()
    }
    if isinstance(spec, ViTSpec) and "local_cls_norm.weight" in tensors:
        expected |= dict.fromkeys(("local_cls_norm.weight", "local_cls_norm.bias"), torch.Size([spec.embed_dim]))
    missing, unexpected = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()
    shapes = [
        f"{key} {list(tensors[key].shape)} instead of {list(shape)}"
        for key, shape in expected.items()
        if key in tensors and tensors[key].shape != shape
    ]
    problems = [
        f"{what}: {_some(items)}"
        for what, items in (
            ("missing", patterns(key for key in expected if key in missing)),
            ("not known", patterns(key for key in tensors if key in unexpected)),
            ("of another shape", shapes),
        )
        if items
    ]
    if problems:
        cause = likely_cause(unexpected) or "The file is incomplete, or of a variant that densedino does not have."
        raise StateDictError(
            f"the checkpoint looks like {spec.name}, but does not fit it: {'; '.join(problems)}. {cause}"
        )


def _some(items: list[str], limit: int = 8) -> str:
    more = f", and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more


def _key_third(bias: Tensor) -> Tensor:
    return bias.chunk(3)[1]


def _without_key(bias: Tensor) -> Tensor:
    if not _key_third(bias).count_nonzero():
        return bias
    out = bias.clone()
    _key_third(out).zero_()
    return out
