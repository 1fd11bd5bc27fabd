"""Owns spreading a backbone's blocks over several GPUs, CPU memory and disk, through `accelerate`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from densedino.engines.eager import EagerEngine, mixed_bf16
from densedino.errors import InputError, require
from densedino.models.vit import VisionTransformer

if TYPE_CHECKING:
    import os

    from densedino.engines.eager import Precision
    from densedino.models.convnext import ConvNeXt

__all__ = ["PlacedEngine", "device_map_of"]


def device_map_of(
    model: VisionTransformer,
    *,
    devices: str | Mapping[str, int | str],
    max_memory: Mapping[int | str, str] | None = None,
) -> dict[str, int | str]:
    """Where each part goes: what is not in blocks to the first device, blocks where `devices` says.

    Args:
        model: a ViT, on the CPU or on meta.
        devices: "auto" (GPUs first, then CPU memory, then disk, as accelerate finds room), or a device per block:
            {"blocks.0": 0, "blocks.1": "cpu", "blocks.2": "disk", …}.
        max_memory: for "auto", room by device, as accelerate takes it: {0: "20GiB", "cpu": "30GiB"}.

    Raises:
        MissingExtraError: accelerate is not installed.
        InputError: a map that leaves out blocks, or names what is no block.
    """
    blocks = [f"blocks.{i}" for i in range(model.depth)]
    if devices == "auto":
        accelerate = require("accelerate", extra="engines", purpose="device_map='auto'")
        dtype = model.blocks[0].attn.proj.weight.dtype
        found = accelerate.infer_auto_device_map(
            model, max_memory=dict(max_memory) if max_memory else None, no_split_module_classes=["Block"], dtype=dtype
        )
        places = {name: _place_of(name, found) for name in blocks}
    elif isinstance(devices, Mapping):
        places = dict(devices)
    else:
        raise InputError(f"device_map {devices!r}: give 'auto', or a mapping of blocks to devices.")
    if odd := sorted(places.keys() ^ set(blocks)):
        raise InputError(f"device_map must name blocks.0 to blocks.{model.depth - 1}, each once; look at {odd[:4]}.")
    main = next((place for place in places.values() if place not in ("cpu", "disk")), "cpu")
    rest = [name for name, _ in model.named_children() if name != "blocks"]
    tokens = [name for name, _ in model.named_parameters(recurse=False)]
    return {**dict.fromkeys([*rest, *tokens], main), **{name: places[name] for name in blocks}}


def _place_of(name: str, found: Mapping[str, int | str]) -> int | str:
    return next(
        place for prefix, place in found.items() if prefix in ("", "blocks") or f"{name}.".startswith(prefix + ".")
    )


class PlacedEngine(EagerEngine):
    """`EagerEngine` around a model whose blocks are on several devices, to which accelerate brings the tokens."""

    name = "placed"

    def __init__(
        self,
        model: VisionTransformer | ConvNeXt,
        *,
        devices: str | Mapping[str, int | str],
        precision: Precision,
        offload: str | os.PathLike[str] | None = None,
        max_memory: Mapping[int | str, str] | None = None,
    ) -> None:
        """Place the model.

        Args:
            model: in CPU memory; it may be a view of its file.
            devices: as `device_map_of` takes it.
            precision: of matrix products.
            offload: a folder for the blocks on "disk".
            max_memory: as `device_map_of` takes it.

        Raises:
            MissingExtraError: accelerate is not installed.
            InputError: a model that is no ViT, a map that does not fit it, or no folder for what goes to disk.
        """
        accelerate = require("accelerate", extra="engines", purpose="device_map=…")
        if not isinstance(model, VisionTransformer):
            raise InputError(f"device_map is for ViTs, whose blocks are all alike; {model.spec.name} is none.")
        mixed = mixed_bf16(model) if precision == "bf16" else model.float()
        places = device_map_of(mixed, devices=devices, max_memory=max_memory)
        if "disk" in places.values() and offload is None:
            raise InputError("device_map puts blocks on disk: give a folder for them, offload=….")
        self.device = torch.device(places["norm"])
        self.precision = precision
        self.model = model
        self.places = places
        """Device of each part."""
        self._runner = accelerate.dispatch_model(
            mixed, places, main_device=places["norm"], offload_dir=offload, force_hooks=True
        )
