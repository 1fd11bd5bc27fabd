"""Owns the one table of weights: file, content hash, statistics, licence, training data, where it can be had.

Architecture stands in `densedino.models.catalog`; a row here names it. No torch is imported.
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass

from densedino.errors import UnknownNameError
from densedino.models.catalog import MODELS

__all__ = [
    "DEFAULT_WEIGHTS",
    "IMAGENET_STATS",
    "SAT493M_STATS",
    "WEIGHTS",
    "WeightsRecord",
    "list_weights",
    "weights_record",
]

Stats = tuple[tuple[float, float, float], tuple[float, float, float]]
IMAGENET_STATS: Stats = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SAT493M_STATS: Stats = ((0.430, 0.411, 0.296), (0.213, 0.156, 0.143))


@dataclass(frozen=True, kw_only=True)
class WeightsRecord:
    """One released set of weights."""

    name: str
    """`<model>-<training data>`, the name that `dd.load` takes."""
    model: str
    """Row of the architecture table."""
    data: str
    """What it was trained on."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    licence: str
    licence_url: str
    file: str
    """File name of the release."""
    sha256: str
    """Leading hex digits of the file's SHA-256, as many as are published."""
    huggingface: str | None = None
    timm: str | None = None


def _meta(model: str, sha256: str, *, sat: bool = False, hub: str | None, timm: str | None) -> WeightsRecord:
    data = "sat493m" if sat else "lvd1689m"
    mean, std = SAT493M_STATS if sat else IMAGENET_STATS
    return WeightsRecord(
        name=f"{model}-{data}",
        model=model,
        data="SAT-493M" if sat else "LVD-1689M",
        mean=mean,
        std=std,
        licence="DINOv3 License",
        licence_url="https://ai.meta.com/resources/models-and-libraries/dinov3-license/",
        file=f"dinov3_{model}_pretrain_{data}-{sha256}.pth",
        sha256=sha256,
        huggingface=hub and f"facebook/dinov3-{hub}-pretrain-{data}",
        timm=timm and f"timm/{timm}{data}",
    )


_RECORDS: tuple[WeightsRecord, ...] = (
    _meta("vits16", "08c60483", hub="vits16", timm="vit_small_patch16_dinov3."),
    _meta("vits16plus", "4057cbaa", hub="vits16plus", timm="vit_small_plus_patch16_dinov3."),
    _meta("vitb16", "73cec8be", hub="vitb16", timm="vit_base_patch16_dinov3."),
    _meta("vitl16", "8aa4cbdd", hub="vitl16", timm="vit_large_patch16_dinov3."),
    _meta("vitl16plus", "46503df0", hub=None, timm=None),  # wired in the release, never announced
    _meta("vith16plus", "7c1da9a5", hub="vith16plus", timm="vit_huge_plus_patch16_dinov3."),
    _meta("vit7b16", "a955f4ea", hub="vit7b16", timm="vit_7b_patch16_dinov3."),
    _meta("convnext_tiny", "21b726bb", hub="convnext-tiny", timm="convnext_tiny.dinov3_"),
    _meta("convnext_small", "296db49d", hub="convnext-small", timm="convnext_small.dinov3_"),
    _meta("convnext_base", "801f2ba9", hub="convnext-base", timm="convnext_base.dinov3_"),
    _meta("convnext_large", "61fa432d", hub="convnext-large", timm="convnext_large.dinov3_"),
    _meta("vitl16", "eadcf0ff", sat=True, hub="vitl16", timm="vit_large_patch16_dinov3."),
    _meta("vit7b16", "a6675841", sat=True, hub="vit7b16", timm="vit_7b_patch16_dinov3."),
)

WEIGHTS: dict[str, WeightsRecord] = {record.name: record for record in _RECORDS}

DEFAULT_WEIGHTS = "vitt16"
"""What `dd.load()` and every command use when nothing is asked for: embedded, or seeded and marked untrained."""


def list_weights(pattern: str = "*") -> list[str]:
    """Names of all weights that match a shell-style `pattern`, in the table's order."""
    return [name for name in WEIGHTS if fnmatch.fnmatch(name, pattern)]


def weights_record(name: str) -> WeightsRecord:
    """The table's row for `name`.

    Raises:
        UnknownNameError: no such weights; the message names the nearest.
    """
    if name not in WEIGHTS:
        raise UnknownNameError("weights", name, [*WEIGHTS, *MODELS])
    return WEIGHTS[name]
