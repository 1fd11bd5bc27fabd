"""Owns writing weights, new or in another dialect, with card and fingerprint, and proving that nothing was lost."""

from __future__ import annotations

import json
from collections import OrderedDict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from densedino.checkpoint import atomic_path
from densedino.errors import InputError, StateDictError
from densedino.models.catalog import ViTSpec
from densedino.weights.catalog import WEIGHTS
from densedino.weights.dialects import DIALECTS, Dialect, from_meta, to_meta
from densedino.weights.files import METADATA_ATTRIBUTE, tensors_sha256
from densedino.weights.fitting import fit
from densedino.weights.identity import CARD_KEY
from densedino.weights.kept import pack_kept
from densedino.weights.loading import Weights, read_weights
from densedino.weights.shape import pack_spec

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from torch import Tensor

    from densedino.weights.card import WeightsCard
    from densedino.weights.fitting import Fitted

__all__ = ["Converted", "convert", "write_weights"]

_SUFFIXES = {"meta": (".pth", ".pt"), "timm": (".safetensors",), "densedino": (".safetensors",)}
_KEPT_LIMIT = 64 << 20  # bytes; what a dialect has no place for is a few vectors


@dataclass(frozen=True)
class Converted:
    """What `convert` wrote."""

    path: Path
    card: WeightsCard
    fingerprint: str
    """SHA-256 of the tensors under Meta's names: the same in every dialect."""
    dropped: tuple[tuple[str, str], ...]
    """(key pattern, why) of what the source file holds besides a backbone."""
    kept: tuple[str, ...]
    """Tensors that the dialect has no place for, carried in the metadata."""
    timm_name: str | None = None
    """What `timm.create_model` calls this architecture; None for the other dialects, or if it has none."""


def convert(weights: Weights, path: str | os.PathLike[str], *, to: Dialect, name: str | None = None) -> Converted:
    """Write weights in another dialect, bit for bit the same tensors.

    Args:
        weights: as `load_weights` takes them.
        path: the file to write; for "huggingface" the folder. It must not exist.
        to: meta (.pth), huggingface (a folder for `from_pretrained`), timm or densedino (.safetensors).
        name: which weights they are, if the file does not say.

    Raises:
        InputError: no such dialect, a file name of another kind, `path` exists, or a pruned model in another dialect
            than densedino's.
        WeightsError: as `load_weights`.
    """
    if to not in DIALECTS:
        raise InputError(f"unknown dialect {to!r}; valid are {', '.join(DIALECTS)}.")
    target = Path(path).expanduser()
    if to in _SUFFIXES and target.suffix not in _SUFFIXES[to]:
        raise InputError(
            f"{target}: {to} is written to a {_SUFFIXES[to][0]} file, and is read by that name. Rename it so."
        )
    if target.exists():
        raise InputError(f"{target} exists, and nothing is overwritten. Give another path, or remove it first.")
    fitted, card = read_weights(name, weights=weights)
    if to != "densedino" and pack_spec(fitted.spec):
        raise InputError(
            f"{card.name} is pruned: its blocks have widths of their own, which {to} has no model for. "
            "Convert it to densedino, or export a graph: densedino export … --to onnx."
        )
    timm_name, qkv_bias = _timm_variant(fitted, card) if to == "timm" else (None, True)
    tensors = from_meta(fitted.tensors, to, qkv_bias=qkv_bias)
    kept = _lost(fitted, tensors)
    fingerprint = _fingerprint(fitted)
    dropped = card.dropped
    card = replace(
        card, dropped=(), dialect=to, notes=(*card.notes, f"converted from {card.dialect}, SHA-256 {card.sha256}")
    )
    metadata = _metadata(card, fingerprint, kept) | pack_spec(fitted.spec) | ({"timm": timm_name} if timm_name else {})
    with atomic_path(target, directory=to == "huggingface") as scratch:
        if to == "meta":
            state = OrderedDict((key, _own_storage(value)) for key, value in tensors.items())
            setattr(state, METADATA_ATTRIBUTE, metadata)  # a strict load of the reference does not see it
            torch.save(state, scratch)
        elif to == "huggingface":
            _write_folder(scratch, fitted, tensors, card, metadata)
        else:
            save_file(_contiguous(tensors), scratch, metadata=metadata)
    return Converted(target, card, fingerprint, dropped, tuple(kept), timm_name)


def write_weights(
    state: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    *,
    card: WeightsCard,
    spec: ViTSpec | None = None,
    extra: Mapping[str, str] | None = None,
) -> str:
    """Write a backbone's state dict as a file of ours, which `load_weights` takes; what is at `path` is replaced.

    Args:
        state: of a module that `create_model` made.
        path: ends in .safetensors.
        card: what is known about the weights; its `sha256` and `source` mean nothing yet, and a reader fills them in.
        spec: of a module that is in no table; it is written along.
        extra: more entries for the metadata.

    Returns:
        The fingerprint: SHA-256 of the tensors under Meta's names.

    Raises:
        StateDictError: tensors of no architecture of the table, or with NaN or infinity.
    """
    fitted = fit(to_meta(state), spec=spec)
    tensors = from_meta(fitted.tensors, "densedino", qkv_bias=True)
    fingerprint = _fingerprint(fitted)
    with atomic_path(Path(path)) as scratch:
        metadata = _metadata(card, fingerprint, _lost(fitted, tensors)) | pack_spec(fitted.spec) | dict(extra or {})
        save_file(_contiguous(tensors), scratch, metadata=metadata)
    return fingerprint


def _fingerprint(fitted: Fitted) -> str:
    return tensors_sha256({k: v for k, v in fitted.tensors.items() if not k.endswith((".bias_mask", ".periods"))})


def _lost(fitted: Fitted, written: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Read the result back, and return what did not come back bit for bit."""
    back = fit(to_meta(written), spec=fitted.spec).tensors
    lost = {key: value for key, value in fitted.tensors.items() if key not in back or not _same_bits(value, back[key])}
    if sum(value.nbytes for value in lost.values()) > _KEPT_LIMIT:
        raise StateDictError(
            f"conversion would lose {', '.join(list(lost)[:5])}; this is a fault of densedino, please report it."
        )
    return lost


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(_bits(one), _bits(other))


def _bits(value: Tensor) -> Tensor:
    return value.detach().cpu().contiguous().flatten().view(torch.uint8)


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.detach().cpu().contiguous() for key, value in tensors.items()}


def _own_storage(value: Tensor) -> Tensor:
    """A view of something larger would take all of it into a .pth file."""
    value = value.detach().cpu().contiguous()
    return value if value.untyped_storage().nbytes() == value.nbytes else value.clone()


def _metadata(card: WeightsCard, fingerprint: str, kept: Mapping[str, Tensor]) -> dict[str, str]:
    return {
        "format": "pt",  # transformers asks for it
        CARD_KEY: json.dumps(card.to_dict(), ensure_ascii=False, sort_keys=True),
        "densedino.fingerprint": fingerprint,
        "licence": f"{card.licence} {card.licence_url}".strip(),
        **pack_kept(_contiguous(kept)),
    }


def _timm_variant(fitted: Fitted, card: WeightsCard) -> tuple[str | None, bool]:
    """(name for timm.create_model, whether it has query and value biases)."""
    record = WEIGHTS.get(card.name) or WEIGHTS.get(f"{card.model}-lvd1689m")
    architecture, _, tag = (record.timm if record and record.timm else "").removeprefix("timm/").partition(".")
    if not isinstance(fitted.spec, ViTSpec):
        return (f"{architecture}.{tag}" if architecture else None), True
    biases = [value for key, value in fitted.tensors.items() if key.endswith(".attn.qkv.bias")]
    if fitted.spec.name == "vitt16":
        return "vit_tiny_patch16_dinov3_qkvb", True
    if any(value.count_nonzero() for value in biases):
        return (f"{architecture}_qkvb.{tag}" if architecture else None), True
    return (f"{architecture}.{tag}" if architecture else None), False


def _write_folder(
    folder: Path, fitted: Fitted, tensors: Mapping[str, Tensor], card: WeightsCard, metadata: dict[str, str]
) -> None:
    """A folder that transformers' AutoModel and AutoImageProcessor open as it is."""
    save_file(_contiguous(tensors), folder / "model.safetensors", metadata=metadata)
    for name, values in (
        ("config.json", _config(fitted, tensors)),
        ("preprocessor_config.json", _preprocessor(card)),
        ("densedino_card.json", card.to_dict()),
    ):
        (folder / name).write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(_readme(card, metadata["densedino.fingerprint"]), encoding="utf-8")


def _config(fitted: Fitted, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    spec = fitted.spec
    common = {
        "dtype": str(next(iter(tensors.values())).dtype).removeprefix("torch."),
        "image_size": 224,
        "layer_norm_eps": spec.norm_eps,
        "num_channels": fitted.in_chans,
    }
    if not isinstance(spec, ViTSpec):
        return {
            "architectures": ["DINOv3ConvNextModel"],
            "model_type": "dinov3_convnext",
            "depths": list(spec.depths),
            "hidden_act": "gelu",
            "hidden_sizes": list(spec.dims),
            "layer_scale_init_value": spec.layer_scale,
            **common,
        }
    return {
        "architectures": ["DINOv3ViTModel"],
        "model_type": "dinov3_vit",
        "hidden_act": "gelu" if spec.ffn == "mlp" else "silu",
        "hidden_size": spec.embed_dim,
        "intermediate_size": spec.hidden_dim,
        "key_bias": False,
        "layerscale_value": spec.layer_scale,
        "mlp_bias": True,
        "num_attention_heads": spec.num_heads,
        "num_hidden_layers": spec.depth,
        "num_register_tokens": spec.num_register_tokens,
        "patch_size": spec.patch_size,
        "proj_bias": True,
        "query_bias": spec.qkv_bias,
        "rope_theta": spec.rope_base,
        "use_gated_mlp": spec.ffn == "swiglu",
        "value_bias": spec.qkv_bias,
        **common,
    }


def _preprocessor(card: WeightsCard) -> dict[str, Any]:
    return {
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(card.mean),
        "image_processor_type": "DINOv3ViTImageProcessorFast",  # the name that 4.56 to 5.x all know
        "image_std": list(card.std),
        "resample": 2,
        "rescale_factor": 1 / 255,
        "size": {"height": 224, "width": 224},
    }


def _readme(card: WeightsCard, fingerprint: str) -> str:
    licence = f"[{card.licence}]({card.licence_url})" if card.licence_url else card.licence
    slug = "-".join(card.licence.lower().split())
    front = "license: apache-2.0" if card.licence == "Apache-2.0" else f"license: other\nlicense_name: {slug}"
    front += f"\nlicense_link: {card.licence_url}" if card.licence_url else ""
    warning = "\n**Untrained: random weights; features are noise.**\n" if card.untrained else ""
    return f"""---
{front}
library_name: transformers
pipeline_tag: image-feature-extraction
---

# {card.name}
{warning}
Written by densedino; the tensors are those of the source, bit for bit.

| | |
|---|---|
| architecture | {card.model}, {card.in_chans} input channels |
| trained on | {card.data} |
| mean, std | {list(card.mean)}, {list(card.std)} |
| licence | {licence}. It holds for this copy as for the original: read it before you pass the folder on. |
| source file, SHA-256 | {card.sha256} |
| tensors, SHA-256 | {fingerprint} |

```python
from transformers import AutoImageProcessor, AutoModel

processor = AutoImageProcessor.from_pretrained("<this folder>")
model = AutoModel.from_pretrained("<this folder>").eval()
tokens = model(**processor(image, return_tensors="pt")).last_hidden_state  # CLS, registers, patches
```
"""
