"""Owns looks on disk: `looks/` in a run's folder, each file whole or not there, and written anew when a step recurs.

    looks/step-00001200.json          step, stage, time, measures, sizes; or why the look failed
    looks/step-00001200.safetensors   patches of the fixed images, float16 [FIXED, h, w, D]
    looks/fixed.safetensors           those images, uint8 [n, side, side, 3], and their names

A step's JSON file is written last, so that its patches are there if it is.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from densedino.checkpoint import atomic_path
from densedino.pretrain.looks import Sizes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

__all__ = ["LookRecord", "read_fixed", "read_looks", "read_patches", "write_fixed", "write_look"]

FOLDER = "looks"
_NAME = re.compile(r"step-(\d+)\.json")


@dataclass(frozen=True, kw_only=True)
class LookRecord:
    """What a look's JSON file says."""

    step: int
    """Optimizer steps taken before it, over all stages."""
    stage: str
    seconds: float = 0.0
    """That the look took."""
    measures: Mapping[str, float] = field(default_factory=dict)
    names: tuple[str, ...] = ()
    """Of the fixed images, in the order of the patches."""
    grid: tuple[int, ...] = ()
    """Rows and columns of their patches."""
    sizes: Sizes | None = None
    failed: str = ""
    """Why there are no measures; empty if there are."""


def write_look(run: Path, record: LookRecord, *, patches: Tensor | None = None) -> None:
    """Write one look; one of the same step is replaced."""
    stem = run / FOLDER / f"step-{record.step:08d}"
    if patches is not None:
        with atomic_path(stem.with_suffix(".safetensors")) as path:
            save_file({"patches": patches.half().contiguous()}, path)
    with atomic_path(stem.with_suffix(".json")) as path:
        path.write_text(json.dumps(asdict(record), indent=1), encoding="utf-8")


def read_looks(run: Path) -> list[LookRecord]:
    """All looks of a run, by step; files that are no looks are passed over."""
    records = []
    for path in sorted((run / FOLDER).glob("step-*.json")):
        if _NAME.fullmatch(path.name):
            records.append(_record(json.loads(path.read_text(encoding="utf-8"))))
    return sorted(records, key=lambda record: record.step)


def _record(data: dict[str, Any]) -> LookRecord:
    sizes = data["sizes"] and Sizes(**data["sizes"])
    return LookRecord(**{**data, "names": tuple(data["names"]), "grid": tuple(data["grid"]), "sizes": sizes})


def read_patches(run: Path, step: int) -> Tensor:
    """Patches [FIXED, h, w, D] of a look, float32."""
    with safe_open(run / FOLDER / f"step-{step:08d}.safetensors", framework="pt") as file:
        patches: Tensor = file.get_tensor("patches").float()
        return patches


def write_fixed(run: Path, fixed: Sequence[tuple[str, Tensor]], *, rgb: tuple[int, int, int] | None) -> None:
    """Keep what the fixed images look like: name, and [C, side, side] in [0, 1]; `rgb` are the channels to show."""
    photos = torch.stack([as_photo(image, rgb=rgb) for _, image in fixed])
    with atomic_path(run / FOLDER / "fixed.safetensors") as path:
        save_file({"photos": photos}, path, metadata={"names": json.dumps([name for name, _ in fixed])})


def read_fixed(run: Path) -> tuple[list[str], Tensor] | None:
    """Names and photos [n, side, side, 3] uint8 of the fixed images; None if no look was taken."""
    path = run / FOLDER / "fixed.safetensors"
    if not path.exists():
        return None
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["names"]), file.get_tensor("photos")


def as_photo(image: Tensor, *, rgb: tuple[int, int, int] | None) -> Tensor:
    """[C, H, W] in [0, 1] → uint8 [H, W, 3] to look at: channels that are no colours are stretched to their range."""
    channels = list(rgb) if rgb else list(range(3)) if len(image) >= 3 else [0, 0, 0]
    shown = image[channels]
    if rgb is None:
        low, high = (shown.flatten(1).quantile(q, dim=1)[:, None, None] for q in (0.02, 0.98))
        shown = (shown - low) / (high - low).clamp(min=1e-6)
    return (shown * 255).round().clamp(0, 255).byte().permute(1, 2, 0).contiguous()
