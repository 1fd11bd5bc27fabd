"""Owns the names that tensors have in each dialect: pure functions from state dict to state dict.

Meta's names are the common tongue, because they are our modules' own:

    meta         released backbones, and training checkpoints that hold one under a prefix (`teacher.backbone.`)
    densedino    the same names, in safetensors with our metadata
    huggingface  transformers' DINOv3ViTModel and DINOv3ConvNextModel: `layer.N` of 4.56, `model.layer.N` of 5.4
    timm         `vit_*_patch16_dinov3`, its `_qkvb` variants, `convnext_*.dinov3_*`

A dialect is a table of templates, read in both directions, and two functions for the fused qkv projection.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from densedino.errors import InputError, StateDictError

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["DIALECTS", "Dialect", "Translation", "from_meta", "likely_cause", "patterns", "to_meta"]

Dialect = Literal["meta", "huggingface", "timm", "densedino"]
DIALECTS: tuple[Dialect, ...] = get_args(Dialect)

# (Meta's name, the dialect's). {i}, {j}: numbers; {p}: weight or bias; {m}: "model.", which may stand there.
_Table = tuple[tuple[str, str], ...]
_HF_VIT: _Table = (
    ("cls_token", "embeddings.cls_token"),
    ("mask_token", "embeddings.mask_token"),
    ("storage_tokens", "embeddings.register_tokens"),
    ("patch_embed.proj.{p}", "embeddings.patch_embeddings.{p}"),
    ("blocks.{i}.norm1.{p}", "{m}layer.{i}.norm1.{p}"),
    ("blocks.{i}.attn.proj.{p}", "{m}layer.{i}.attention.o_proj.{p}"),
    ("blocks.{i}.ls1.gamma", "{m}layer.{i}.layer_scale1.lambda1"),
    ("blocks.{i}.norm2.{p}", "{m}layer.{i}.norm2.{p}"),
    ("blocks.{i}.mlp.fc1.{p}", "{m}layer.{i}.mlp.up_proj.{p}"),
    ("blocks.{i}.mlp.fc2.{p}", "{m}layer.{i}.mlp.down_proj.{p}"),
    ("blocks.{i}.ls2.gamma", "{m}layer.{i}.layer_scale2.lambda1"),
    ("norm.{p}", "norm.{p}"),
)
_HF_VIT_GATED: _Table = (
    ("blocks.{i}.mlp.w1.{p}", "{m}layer.{i}.mlp.gate_proj.{p}"),
    ("blocks.{i}.mlp.w2.{p}", "{m}layer.{i}.mlp.up_proj.{p}"),
    ("blocks.{i}.mlp.w3.{p}", "{m}layer.{i}.mlp.down_proj.{p}"),
    *_HF_VIT,
)
_TIMM_VIT: _Table = (
    ("storage_tokens", "reg_token"),
    ("blocks.{i}.ls1.gamma", "blocks.{i}.gamma_1"),
    ("blocks.{i}.ls2.gamma", "blocks.{i}.gamma_2"),
)
_TIMM_VIT_GATED: _Table = (
    ("blocks.{i}.mlp.w1.{p}", "blocks.{i}.mlp.fc1_g.{p}"),
    ("blocks.{i}.mlp.w2.{p}", "blocks.{i}.mlp.fc1_x.{p}"),
    ("blocks.{i}.mlp.w3.{p}", "blocks.{i}.mlp.fc2.{p}"),
    *_TIMM_VIT,
)
_HF_CONVNEXT: _Table = (
    ("downsample_layers.{i}.{j}.{p}", "{m}stages.{i}.downsample_layers.{j}.{p}"),
    ("stages.{i}.{j}.gamma", "{m}stages.{i}.layers.{j}.gamma"),
    ("stages.{i}.{j}.dwconv.{p}", "{m}stages.{i}.layers.{j}.depthwise_conv.{p}"),
    ("stages.{i}.{j}.norm.{p}", "{m}stages.{i}.layers.{j}.layer_norm.{p}"),
    ("stages.{i}.{j}.pwconv1.{p}", "{m}stages.{i}.layers.{j}.pointwise_conv1.{p}"),
    ("stages.{i}.{j}.pwconv2.{p}", "{m}stages.{i}.layers.{j}.pointwise_conv2.{p}"),
    ("norm.{p}", "layer_norm.{p}"),
)
_TIMM_CONVNEXT: _Table = (
    ("downsample_layers.0.{j}.{p}", "stem.{j}.{p}"),
    ("downsample_layers.{i}.{j}.{p}", "stages.{i}.downsample.{j}.{p}"),
    ("stages.{i}.{j}.gamma", "stages.{i}.blocks.{j}.gamma"),
    ("stages.{i}.{j}.dwconv.{p}", "stages.{i}.blocks.{j}.conv_dw.{p}"),
    ("stages.{i}.{j}.norm.{p}", "stages.{i}.blocks.{j}.norm.{p}"),
    ("stages.{i}.{j}.pwconv1.{p}", "stages.{i}.blocks.{j}.mlp.fc1.{p}"),
    ("stages.{i}.{j}.pwconv2.{p}", "stages.{i}.blocks.{j}.mlp.fc2.{p}"),
    ("norm.{p}", "head.norm.{p}"),
)
_TABLES: dict[tuple[Dialect, bool, bool], _Table] = {  # (dialect, is a ConvNeXt, has a gated feed-forward)
    ("huggingface", False, False): _HF_VIT,
    ("huggingface", False, True): _HF_VIT_GATED,
    ("huggingface", True, False): _HF_CONVNEXT,
    ("timm", False, False): _TIMM_VIT,
    ("timm", False, True): _TIMM_VIT_GATED,
    ("timm", True, False): _TIMM_CONVNEXT,
}

# One tensor that every backbone has: what precedes it is the prefix.
_ANCHORS: tuple[tuple[Dialect, bool, str], ...] = (
    ("meta", False, "patch_embed.proj.weight"),  # timm's too; told apart by the name of its LayerScale
    ("meta", True, "downsample_layers.0.0.weight"),
    ("huggingface", False, "embeddings.patch_embeddings.weight"),
    ("huggingface", True, "stages.0.downsample_layers.0.weight"),
    ("timm", True, "stages.0.blocks.0.conv_dw.weight"),
)
# Which copy of the backbone to take when a training checkpoint has several. The average is the model; of the plain
# ones, "teacher" is the average in self-distillation, where there is no "model_ema".
_COPIES = ("model_ema", "teacher", "student")
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})  # path segments, not names


@dataclass(frozen=True)
class Translation:
    """A backbone's tensors under Meta's names."""

    tensors: dict[str, Tensor]
    dialect: Dialect
    dropped: tuple[tuple[str, str], ...]
    """(key pattern, why) of what is in the file and is not the backbone."""
    notes: tuple[str, ...]
    parts: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)
    """What `join=False` left in parts; in `tensors` stands an empty one of the joined shape, on the meta device."""

    @property
    def convnext(self) -> bool:
        """True for a ConvNeXt, False for a ViT."""
        return any(key.startswith("downsample_layers.") for key in self.tensors)


def to_meta(state: Mapping[str, Any], *, join: bool = True) -> Translation:
    """Find the backbone in a checkpoint of any dialect and translate its names.

    Args:
        state: tensors by name; nested mappings (`{"teacher": {...}, "iteration": 7}`) are opened.
        join: put matrices that the dialect has in parts into one, which takes memory for them.

    Raises:
        StateDictError: no backbone in it, several between which nothing decides, or a qkv projection in parts.
    """
    tensors, others = _flatten(state)
    dialect, convnext, prefix, rivals = _find(tensors)
    inside = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    outside = [key for key in tensors if not key.startswith(prefix)]
    dropped = [(pattern, "not weights") for pattern in patterns(others)]
    dropped += [(f"{rival}*", f"another copy of the backbone; {prefix}* was taken") for rival in rivals]
    rest = [key for key in outside if not key.startswith(tuple(rivals))] if rivals else outside
    tops = sorted({_top(key, prefix) for key in rest} - set(others))
    dropped += [(f"{top}*", f"not part of the backbone {prefix}*") for top in tops]
    notes = (f"taken from {prefix}*",) if rivals else ()
    parts: dict[str, tuple[Tensor, ...]] = {}
    if dialect != "meta":
        inside = _fuse_qkv(inside, dialect, apart=None if join else parts)
        gated = any(key.endswith((".mlp.gate_proj.weight", ".mlp.fc1_g.weight")) for key in inside)
        table = _TABLES[dialect, convnext, gated]
        inside = {_rename(key, table, back=True): value for key, value in inside.items()}
        if "mask_token" in inside and inside["mask_token"].ndim == 3:
            inside["mask_token"] = inside["mask_token"].squeeze(0)
    return Translation(inside, dialect, tuple(dropped), notes, parts)


def from_meta(tensors: Mapping[str, Tensor], dialect: Dialect, *, qkv_bias: bool = True) -> dict[str, Tensor]:
    """Name a backbone's tensors as `dialect` does; what it has no place for is left out.

    Args:
        tensors: under Meta's names.
        dialect: the target.
        qkv_bias: timm only: write query and value biases (its `_qkvb` variants), or leave them out.

    Raises:
        InputError: no such dialect.
    """
    if dialect not in DIALECTS:
        raise InputError(f"unknown dialect {dialect!r}; valid are {', '.join(DIALECTS)}.")
    out = dict(tensors)
    convnext = any(key.startswith("downsample_layers.") for key in out)
    if dialect == "meta" and convnext:
        return out | {f"norms.3.{p}": out[f"norm.{p}"].clone() for p in ("weight", "bias")}
    if dialect in ("meta", "densedino"):
        return out
    unplaced = ("rope_embed.", "local_cls_norm.", "cls_norm.") + (("mask_token",) if dialect == "timm" else ())
    out = {key: value for key, value in out.items() if not key.startswith(unplaced) and not key.endswith(".bias_mask")}
    out = _split_qkv(out, dialect, qkv_bias=qkv_bias)
    table = _TABLES[dialect, convnext, any(".mlp.w1." in key for key in out)]
    out = {_rename(key, table, back=False): value for key, value in out.items()}
    if "embeddings.mask_token" in out:
        out["embeddings.mask_token"] = out["embeddings.mask_token"].unsqueeze(0)
    return out


def patterns(keys: Iterable[str]) -> list[str]:
    """Key names with numbers replaced by `*`, each once, in order of appearance."""
    return list(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", key) for key in keys))


def _flatten(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors by dotted path without wrapper segments, and the top-level names of everything that is no tensor."""
    tensors: dict[str, Tensor] = {}
    others: dict[str, None] = {}
    stack: list[tuple[str, Any]] = [(str(key), value) for key, value in reversed(list(state.items()))]
    while stack:
        path, value = stack.pop()
        if isinstance(value, Tensor):
            key = ".".join(segment for segment in path.split(".") if segment not in _WRAPPERS)
            if key in tensors:
                raise StateDictError(f"two tensors are named {key!r} once wrapper names ({path!r}) are taken off.")
            tensors[key] = value
        elif isinstance(value, Mapping):
            stack += [(f"{path}.{key}", inner) for key, inner in reversed(list(value.items()))]
        else:
            others[path.split(".")[0]] = None
    return tensors, list(others)


def _find(tensors: Mapping[str, Tensor]) -> tuple[Dialect, bool, str, list[str]]:
    """(dialect, is a ConvNeXt, prefix of the copy to take, prefixes of the others)."""
    found: dict[str, tuple[Dialect, bool]] = {}
    for key in tensors:
        for dialect, convnext, anchor in _ANCHORS:
            if key == anchor or key.endswith(f".{anchor}"):
                prefix = key.removesuffix(anchor)
                if dialect == "huggingface" and convnext and f"{prefix}layer_norm.weight" not in tensors:
                    prefix = prefix.removesuffix("model.")  # that one belongs to transformers' own names
                named_by_timm = f"{prefix}blocks.0.gamma_1" in tensors
                found[prefix] = ("timm" if named_by_timm else dialect, convnext)
    if not found:
        sample = ", ".join(patterns(list(tensors))[:6]) or "no tensors at all"
        raise StateDictError(
            f"no DINOv3 backbone in this checkpoint; it has {sample}. Readable are Meta's, transformers', timm's and "
            f"densedino's names, under any prefix. {likely_cause(tensors)}".rstrip()
        )
    prefix = _choose(list(found))
    return *found[prefix], prefix, [other for other in found if other != prefix]


def _choose(prefixes: list[str]) -> str:
    if len(prefixes) == 1:
        return prefixes[0]
    for copy in _COPIES:
        named = [prefix for prefix in prefixes if copy in prefix.split(".")]
        if len(named) == 1:
            return named[0]
        if named:
            break
    raise StateDictError(
        f"several backbones in this checkpoint, under the prefixes {', '.join(map(repr, prefixes))}; nothing says "
        "which to take. Save the one that is meant on its own, or pass its tensors as a mapping."
    )


def likely_cause(keys: Iterable[str]) -> str:
    """A sentence on what a state dict with such unknown names probably is, or ""."""
    joined = " ".join(keys)
    for sign, cause in (
        (
            "lora_",
            "The names are those of a LoRA adapter: merge it into its base model first (peft: merge_and_unload()).",
        ),
        ("base_layer", "The names are those of a LoRA adapter: merge it into its base model first."),
        ("pos_embed", "A learned position embedding says DINOv2 or another ViT: DINOv3 has none."),
        ("position_embeddings", "A learned position embedding says DINOv2 or another ViT: DINOv3 has none."),
        ("blocks.0.0.", "The blocks are in chunks: save the model with block_chunks=0."),
        ("_scale", "Scales beside the weights say that the file is quantised: load the original weights."),
        ("linear.", "It may be a head without its backbone."),
    ):
        if sign in joined:
            return cause
    return ""


def _top(key: str, prefix: str) -> str:
    """The first part of `key` that is not shared with `prefix`, with the parts before it: "teacher.dino_head."."""
    parts, common = key.split("."), prefix.split(".")
    shared = 0
    while shared < len(parts) - 1 and shared < len(common) and parts[shared] == common[shared]:
        shared += 1
    return ".".join(parts[: shared + 1])


@functools.cache
def _compiled(table: _Table, back: bool) -> tuple[tuple[re.Pattern[str], str], ...]:
    rows = []
    for meta, other in table:
        source, target = (other, meta) if back else (meta, other)
        pattern = re.escape(source).replace(re.escape("{m}"), r"(?:model\.)?")
        for name, expression in (("i", r"\d+"), ("j", r"\d+"), ("p", "weight|bias")):
            pattern = pattern.replace(re.escape(f"{{{name}}}"), f"(?P<{name}>{expression})")
        rows.append((re.compile(pattern), target))
    return tuple(rows)


def _rename(key: str, table: _Table, *, back: bool) -> str:
    """Translate one name; names that are in no row stay as they are, for the strict check to see."""
    for pattern, target in _compiled(table, back):
        if match := pattern.fullmatch(key):
            return target.format(m="", **match.groupdict())
    return key


def _fuse_qkv(
    tensors: Mapping[str, Tensor], dialect: Dialect, *, apart: dict[str, tuple[Tensor, ...]] | None
) -> dict[str, Tensor]:
    """Put transformers' three projections, or timm's two biases, into Meta's one; matrices, if given, into `apart`."""
    if dialect == "huggingface":
        part = re.compile(r"(?:model\.)?layer\.(\d+)\.attention\.([qkv])_proj\.(weight|bias)")
    else:
        part = re.compile(r"blocks\.(\d+)\.attn\.([qkv])_(bias)")
    parts: dict[str, dict[str, Tensor]] = {}
    out: dict[str, Tensor] = {}
    for key, value in tensors.items():
        if match := part.fullmatch(key):
            parts.setdefault(f"blocks.{match[1]}.attn.qkv.{match[3]}", {})[match[2]] = value
        else:
            out[key] = value
    for name, group in parts.items():
        bias = name.endswith(".bias")
        if bias and "q" in group and "k" not in group:
            group["k"] = torch.zeros_like(group["q"])
        if missing := [letter for letter in "qkv" if letter not in group]:
            raise StateDictError(f"{name}: the file has no {' and no '.join(missing)} part of it.")
        if bias and group["k"].count_nonzero():
            raise StateDictError(
                f"{name}: the key part is not zero, and {dialect} applies it; DINOv3 has no key bias, so the features "
                "would differ. This is another model."
            )
        whole = (group["q"], group["k"], group["v"])
        if apart is None or bias:
            out[name] = torch.cat(whole)
        else:
            apart[name] = whole
            out[name] = torch.cat([part.to("meta") for part in whole])
    return out


def _split_qkv(tensors: Mapping[str, Tensor], dialect: Dialect, *, qkv_bias: bool) -> dict[str, Tensor]:
    """Inverse of `_fuse_qkv`."""
    out: dict[str, Tensor] = {}
    for key, value in tensors.items():
        match = re.fullmatch(r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)", key)
        if match is None or (dialect == "timm" and match[2] == "weight"):
            out[key] = value
            continue
        for letter, third in zip("qkv", value.chunk(3), strict=True):
            if dialect == "huggingface" and (match[2], letter) != ("bias", "k"):
                out[f"layer.{match[1]}.attention.{letter}_proj.{match[2]}"] = third.contiguous()
            elif dialect == "timm" and letter != "k" and qkv_bias:
                out[f"blocks.{match[1]}.attn.{letter}_bias"] = third.contiguous()
    return out
