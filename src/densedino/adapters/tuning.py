"""Owns which of a backbone's parameters are trained, and how fast: none, low-rank changes, norms and biases, or all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from densedino.adapters.lora import LoraConfig, add_lora
from densedino.errors import InputError, UnknownNameError
from densedino.models.order import layers_of

if TYPE_CHECKING:
    from torch import nn

__all__ = ["TuneConfig", "trained_backbone", "tune"]

Kind = Literal["frozen", "lora", "dora", "norm-bias", "full"]
_UNUSED = ("mask_token", "local_cls_norm.")  # of pretraining alone


LR_MULTIPLIERS = {"frozen": 1.0, "lora": 1.0, "dora": 1.0, "norm-bias": 0.3, "full": 0.03}
"""Low-rank changes begin at nothing and want large steps; weights that know something want small ones."""


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """What of the backbone is trained along with the head."""

    kind: Kind = "frozen"
    """lora, dora: low-rank changes of linear maps. norm-bias: norms, biases and LayerScale (BitFit and its kin). full:
    all, with smaller steps the nearer to the pixels."""
    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("attn.qkv",)
    """Of LoRA and DoRA: ends of layers' names."""
    lr_multiplier: float | None = None
    """Of the backbone's learning rate to the head's; None for what the kind stands, see `LR_MULTIPLIERS`."""
    layer_decay: float = 0.75
    """Full: of the learning rate from each block to the one before (BEiT, arXiv:2106.08254)."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise UnknownNameError("tuning", self.kind, get_args(Kind))
        if (self.lr_multiplier is not None and self.lr_multiplier <= 0) or not 0 < self.layer_decay <= 1:
            raise InputError(
                f"lr_multiplier {self.lr_multiplier}, layer_decay {self.layer_decay}: the first is above 0, the second "
                "in (0, 1]."
            )

    @property
    def multiplier(self) -> float:
        """Of the backbone's learning rate."""
        return LR_MULTIPLIERS[self.kind] if self.lr_multiplier is None else self.lr_multiplier

    @property
    def lora(self) -> LoraConfig | None:
        """Of lora and dora."""
        if self.kind not in ("lora", "dora"):
            return None
        return LoraConfig(rank=self.rank, alpha=self.alpha, targets=self.targets, dora=self.kind == "dora")


def tune(model: nn.Module, config: TuneConfig, *, seed: int = 0) -> list[dict[str, Any]]:
    """Freeze and free a backbone's parameters, in place, add LoRA where asked, and return groups for `fit`.

    Raises:
        InputError: LoRA targets that the model does not have, or nothing to train.
    """
    model.requires_grad_(False)
    if config.kind == "frozen":
        return []
    if config.lora is not None:
        add_lora(model, config.lora, seed=seed)
        free = {name for name, _ in model.named_parameters() if ".parametrizations.weight.0." in name}
    else:
        names = [name for name, _ in model.named_parameters() if not name.startswith(_UNUSED)]
        free = {name for name in names if config.kind == "full" or _is_norm_or_bias(name)}
    decay = config.layer_decay if config.kind == "full" else 1.0
    layers = layers_of([name for name, _ in model.named_parameters()])
    last = max(layers.values())
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if name in free:
            parameter.requires_grad_(True)
            multiplier = config.multiplier * decay ** (last - layers[name])
            decays = 1.0 if parameter.ndim > 1 and config.kind != "norm-bias" else 0.0
            group = {"params": [], "lr_multiplier": multiplier, "wd_multiplier": decays}
            groups.setdefault((multiplier, decays), group)["params"].append(parameter)
    return list(groups.values())


def _is_norm_or_bias(name: str) -> bool:
    return name.endswith((".bias", ".gamma")) or "norm" in name


def trained_backbone(model: nn.Module) -> dict[str, nn.Parameter]:
    """The backbone's parameters that are trained, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
