"""Owns running a module whose large tensors stay in their file until their layer is called.

For heads that are larger than what memory is left beside a streamed backbone. It holds for modules whose large
parameters are used by the forward of the module that owns them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Mapping

    from densedino.weights.stored import Stored

__all__ = ["page"]

_SMALL = 12 << 20  # bytes; smaller ones are read once and stay


def page(module: nn.Module, stored: Mapping[str, Stored]) -> None:
    """Read small tensors into `module` (built on meta), and let each layer read its large ones when it is called.

    Floats become float32.

    Args:
        module: on the meta device.
        stored: every parameter and buffer, by the module's name for it.
    """
    for prefix, part in module.named_modules(remove_duplicate=False):
        own = {
            name: stored[f"{prefix}.{name}" if prefix else name]
            for name, _ in (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False))
        }
        large = {name for name in own if _own(part, name).numel() * 4 > _SMALL}
        for name in own.keys() - large:
            _put(part, name, _read(own[name], _own(part, name)))
        if large:
            _page_layer(part, {name: own[name] for name in sorted(large)})
    module.requires_grad_(False)


def _page_layer(part: nn.Module, large: Mapping[str, Stored]) -> None:
    empty = {name: _own(part, name) for name in large}

    def fetch(*_: Any) -> None:
        for name, source in large.items():
            _put(part, name, _read(source, empty[name]))

    def drop(*_: Any) -> None:
        for name, value in empty.items():
            _put(part, name, value)

    part.register_forward_pre_hook(fetch)
    part.register_forward_hook(drop, always_call=True)


def _own(part: nn.Module, name: str) -> Tensor:
    value: Tensor = getattr(part, name)
    return value


def _put(part: nn.Module, name: str, value: Tensor) -> None:
    if name in part._parameters:
        part._parameters[name] = nn.Parameter(value.detach(), requires_grad=False)
    else:
        part._buffers[name] = value


def _read(source: Stored, like: Tensor) -> Tensor:
    out = torch.empty(like.shape, dtype=like.dtype, device="cpu")
    source.read(out)
    return out
