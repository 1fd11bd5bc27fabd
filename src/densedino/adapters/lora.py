"""Owns low-rank changes of a backbone's linear maps, LoRA and DoRA: what they are, and how they are written and read.

A change is a parametrization of the weight: whoever reads `layer.weight` gets the changed one, so that what runs is
always what merging gives. Files are those of the `peft` package, in both directions.

LoRA: Hu et al. 2022, arXiv:2106.09685, §4.1. DoRA: Liu et al. 2024, arXiv:2402.09353, §4.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from densedino.errors import InputError, StateDictError, WeightsNotFoundError

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Mapping

__all__ = ["LoraConfig", "add_lora", "load_lora", "lora_layers", "merge_lora", "save_lora"]

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
"""The names that `peft` has for its files."""
_PREFIX = "base_model.model."
_MATRICES = ("lora_A.weight", "lora_B.weight")
_MAGNITUDE = "lora_magnitude_vector"


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Which linear maps are changed, and by how much freedom."""

    rank: int = 8
    alpha: float = 16.0
    """The change is (alpha / rank) · B · A."""
    targets: tuple[str, ...] = ("attn.qkv",)
    """Ends of layers' names: attn.qkv, attn.proj, mlp.fc1, mlp.fc2 (SwiGLU: mlp.w1, mlp.w2, mlp.w3)."""
    dora: bool = False
    """The length of each output's weights is learnt apart from their direction."""

    def __post_init__(self) -> None:
        if self.rank < 1 or not self.targets or not self.alpha > 0:
            raise InputError(
                f"LoRA of rank {self.rank}, alpha {self.alpha}, targets {self.targets}: rank and alpha must be above "
                "0, and there must be a target, as attn.qkv."
            )


class LowRank(nn.Module):
    """W to W + scale · B A; with a magnitude m, to m · that, each row at length 1. At first it is W itself."""

    def __init__(self, weight: Tensor, *, rank: int, scale: float, dora: bool, generator: torch.Generator) -> None:
        super().__init__()
        self.scale = scale
        self.lora_A = nn.Parameter(torch.empty(rank, weight.shape[1]))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5), generator=generator)
        self.lora_B = nn.Parameter(torch.zeros(weight.shape[0], rank))
        self.magnitude = nn.Parameter(_lengths(weight)) if dora else None
        self.to(weight.device, weight.dtype)

    def forward(self, weight: Tensor) -> Tensor:
        """[out, in] -> [out, in]."""
        changed = weight + self.scale * (self.lora_B @ self.lora_A)
        if self.magnitude is None:
            return changed
        return changed * (self.magnitude / _lengths(changed))[:, None]


def _lengths(weight: Tensor) -> Tensor:
    """Of the rows, [out]; no gradient passes (DoRA §4.3: less memory, and as good)."""
    return torch.linalg.vector_norm(weight.detach(), dim=1)


def add_lora(model: nn.Module, config: LoraConfig, *, seed: int = 0) -> list[str]:
    """Change the linear maps that `config` names, in place, and return their names; outputs stay as they are at first.

    Raises:
        InputError: a target that is the end of no linear layer's name, or layers that are changed already.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for target in config.targets:
        if not any(_ends(name, target) for name in linears):
            ends = sorted({".".join(name.split(".")[2:]) for name in linears if name.startswith("blocks.")})
            raise InputError(f"LoRA target {target!r} is no linear layer of this model. It has: {', '.join(ends)}.")
    names = [name for name in linears if any(_ends(name, target) for target in config.targets)]
    for number, name in enumerate(names):
        _parametrize(linears[name], name, config, scale=config.alpha / config.rank, seed=seed * 100_003 + number)
    return names


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _parametrize(layer: nn.Linear, name: str, config: LoraConfig, *, scale: float, seed: int) -> LowRank:
    if parametrize.is_parametrized(layer):
        raise InputError(f"{name} has a LoRA already. Merge it first: merge_lora(model).")
    generator = torch.Generator().manual_seed(seed)
    weight = layer.weight.detach()
    change = LowRank(weight, rank=config.rank, scale=scale, dora=config.dora, generator=generator)
    parametrize.register_parametrization(layer, "weight", change)
    return change


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LowRank]]:
    """Name and change of every layer that has one."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and parametrize.is_parametrized(module, "weight"):
            change = module.parametrizations.weight[0]  # type: ignore[union-attr,index]
            if isinstance(change, LowRank):
                yield name, change


def merge_lora(model: nn.Module) -> None:
    """Make the changed weights the weights, in place; parameter names are those of a plain backbone again."""
    for name, _ in list(lora_layers(model)):
        parametrize.remove_parametrizations(model.get_submodule(name), "weight", leave_parametrized=True)


def save_lora(model: nn.Module, folder: Path, config: LoraConfig, *, base: str) -> None:
    """Write the changes of `model` as `peft` does; `PeftModel.from_pretrained` reads them onto the same backbone.

    Args:
        model: with `add_lora`.
        folder: is made; not written atomically by itself.
        config: what `add_lora` was given.
        base: what the backbone's weights are called.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for name, change in lora_layers(model):
        tensors |= {
            f"{_PREFIX}{name}.{key}": t for key, t in zip(_MATRICES, (change.lora_A, change.lora_B), strict=True)
        }
        if change.magnitude is not None:
            tensors[f"{_PREFIX}{name}.{_MAGNITUDE}"] = change.magnitude
    save_file({key: t.detach().cpu().contiguous() for key, t in tensors.items()}, folder / TENSORS)
    values = {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "target_modules": list(config.targets),
        "use_dora": config.dora,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    (folder / CONFIG).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def load_lora(model: nn.Module, folder: str | os.PathLike[str]) -> LoraConfig:
    """Put the changes in `folder`, written by us or by `peft`, on a backbone that has none.

    Raises:
        WeightsNotFoundError: no such files.
        StateDictError: they are of another model, or of a kind that this does not know.
    """
    path = Path(folder)
    if not (path / CONFIG).is_file() or not (path / TENSORS).is_file():
        raise WeightsNotFoundError(
            f"{str(path)!r} is no LoRA: it must hold {CONFIG} and {TENSORS}, as peft writes them."
        )
    values = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    config, scale = _read_config(values, path)
    tensors = load_file(path / TENSORS)
    suffixes = (*_MATRICES, *([_MAGNITUDE] if config.dora else []))
    names = sorted(
        {key.removeprefix(_PREFIX).removesuffix(f".{end}") for key in tensors for end in suffixes if end in key}
    )
    modules = dict(model.named_modules())
    for name in names:
        layer = modules.get(name)
        if not isinstance(layer, nn.Linear):
            raise StateDictError(f"{path}: it changes {name!r}, which is no linear layer of this backbone.")
        parts = [tensors.pop(f"{_PREFIX}{name}.{end}", None) for end in suffixes]
        shapes = ((config.rank, layer.in_features), (layer.out_features, config.rank), (layer.out_features,))
        for end, part, shape in zip(suffixes, parts, shapes[: len(suffixes)], strict=True):
            if part is None or tuple(part.shape) != shape:
                got = "missing" if part is None else f"of shape {tuple(part.shape)}"
                raise StateDictError(
                    f"{path}: {name}.{end} is {got}; this backbone needs {shape}. It is of another model."
                )
        change = _parametrize(layer, name, config, scale=scale, seed=0)
        with torch.no_grad():
            for parameter, part in zip(change.parameters(), parts, strict=True):
                parameter.copy_(part)
    if tensors or not names:
        raise StateDictError(f"{path}: tensors that are no part of a LoRA: {', '.join(sorted(tensors)[:3]) or 'all'}.")
    return config


def _read_config(values: Mapping[str, Any], path: Path) -> tuple[LoraConfig, float]:
    """The configuration and the factor of B A."""
    odd = [key for key in ("fan_in_fan_out", "rank_pattern", "alpha_pattern", "modules_to_save") if values.get(key)]
    odd += ["bias"] if values.get("bias", "none") != "none" else []
    if values.get("peft_type") != "LORA" or odd:
        raise StateDictError(
            f"{path / CONFIG}: {values.get('peft_type')} with {', '.join(odd) or 'another type'}; what is read is "
            "LORA, plain or DoRA, of one rank."
        )
    rank, alpha = int(values["r"]), float(values["lora_alpha"])
    targets = values.get("target_modules") or ()
    config = LoraConfig(
        rank=rank,
        alpha=alpha,
        targets=(targets,) if isinstance(targets, str) else tuple(sorted(targets)),
        dora=bool(values.get("use_dora")),
    )
    return config, alpha / math.sqrt(rank) if values.get("use_rslora") else alpha / rank
