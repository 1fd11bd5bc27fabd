"""Owns the optimizer's side of a step: parameter groups, per-step values, clipping by module, the EMA teacher."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from densedino.errors import InputError
from densedino.models.order import is_token, layers_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn

    from densedino.pretrain import Fidelity

__all__ = ["adamw", "clip_gradients", "parameter_groups", "set_hyperparameters", "update_ema"]


def parameter_groups(
    backbone: nn.Module,
    *,
    heads: Sequence[nn.Module] = (),
    layer_decay: float = 1.0,
    patch_embed_lr: float = 0.2,
    fidelity: Fidelity = "released",
) -> list[dict[str, Any]]:
    """Optimizer groups of the trainable parameters, one for each (lr multiplier, weight-decay multiplier, last layer).

    A group carries `lr_multiplier`, `wd_multiplier` and `is_last_layer`, which `set_hyperparameters` reads.

    Args:
        backbone: a ViT or ConvNeXt of `densedino.models`.
        heads: projection heads; multiplier 1.
        layer_decay: layer l of `layers_of` gets layer_decay^(depth + 1 − l).
        patch_embed_lr: further multiplier of the patch embedding (or a ConvNeXt's stem).
        fidelity: "released" exempts from weight decay what is named bias, norm or gamma, and so decays class, mask
            and register tokens and the LayerNorms between a ConvNeXt's stages; "paper" exempts those too.
    """
    groups: dict[tuple[float, float, bool], dict[str, Any]] = {}

    def add(name: str, parameter: Tensor, multiplier: float) -> None:
        if parameter.requires_grad:
            key = (multiplier, 0.0 if _exempt(name, parameter, fidelity) else 1.0, "last_layer" in name)
            group = groups.setdefault(
                key, {"params": [], "lr_multiplier": key[0], "wd_multiplier": key[1], "is_last_layer": key[2]}
            )
            group["params"].append(parameter)

    layers = layers_of([name for name, _ in backbone.named_parameters()])
    last = max(layers.values(), default=0)
    for name, parameter in backbone.named_parameters():
        embeds = name.startswith(("patch_embed.", "downsample_layers.0."))
        add(name, parameter, layer_decay ** (last - layers[name]) * (patch_embed_lr if embeds else 1.0))
    for head in heads:
        for name, parameter in head.named_parameters():
            add(name, parameter, 1.0)
    return list(groups.values())


def adamw(
    groups: list[dict[str, Any]], *, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`, with torch's fused step; learning rates come with `set_hyperparameters`."""
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps, weight_decay=0.0, fused=True)


def set_hyperparameters(
    optimizer: torch.optim.Optimizer, *, lr: float, weight_decay: float, last_layer_lr: float | None = None
) -> None:
    """Set this step's values in every group, times the group's multipliers.

    `last_layer_lr` is the prototypes' learning rate, by default `lr`; 0 freezes them.
    """
    for group in optimizer.param_groups:
        base = last_layer_lr if group["is_last_layer"] and last_layer_lr is not None else lr
        group["lr"] = base * group["lr_multiplier"]
        group["weight_decay"] = weight_decay * group["wd_multiplier"]


def clip_gradients(modules: Mapping[str, nn.Module], *, max_norm: float) -> dict[str, Tensor]:
    """Scale each module's gradients down to `max_norm`, by itself; returns the norms before, by name."""
    return {name: torch.nn.utils.clip_grad_norm_(module.parameters(), max_norm) for name, module in modules.items()}


@torch.no_grad()
def update_ema(teacher: nn.Module, student: nn.Module, *, momentum: float) -> None:
    """Make each teacher parameter momentum · itself + (1 − momentum) · the student's; momentum 0 copies.

    Raises:
        InputError: the two have different parameters.
    """
    ours: list[Tensor] = list(teacher.parameters())
    theirs: list[Tensor] = list(student.parameters())
    if [p.shape for p in ours] != [p.shape for p in theirs]:
        raise InputError(
            f"an EMA teacher has the student's parameters; got {len(ours)} tensors in the teacher and {len(theirs)} in"
            " the student, or other shapes. Build both from the same specification."
        )
    if momentum == 0:
        for one, other in zip(ours, theirs, strict=True):  # DTensors have no _foreach_copy_
            one.copy_(other)
    else:
        torch._foreach_mul_(ours, momentum)
        torch._foreach_add_(ours, theirs, alpha=1 - momentum)


def _exempt(name: str, parameter: Tensor, fidelity: Fidelity) -> bool:
    if name.endswith("bias") or "norm" in name or "gamma" in name:
        return True
    return fidelity == "paper" and (parameter.ndim < 2 or is_token(name))
