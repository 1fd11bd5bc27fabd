"""Owns running a backbone as plain PyTorch: device, precision, and one call from pixels to typed tokens."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

import torch
from torch import Tensor, nn

from densedino.errors import InputError, UnknownNameError
from densedino.models.vit import block_indices

if TYPE_CHECKING:
    from collections.abc import Sequence

    from densedino.models.convnext import ConvNeXt
    from densedino.models.vit import VisionTransformer

__all__ = ["EagerEngine", "LayerTokens", "Precision", "choose_device", "choose_precision"]

Precision = Literal["fp32", "bf16"]
ModuleT = TypeVar("ModuleT", bound=nn.Module)


@dataclass(frozen=True)
class LayerTokens:
    """Tokens of one block: patches [B, h, w, D], cls [B, D], registers [B, R, D]."""

    patches: Tensor
    cls: Tensor
    registers: Tensor


def choose_device(device: str | torch.device = "auto") -> torch.device:
    """`auto` is CUDA if there is one, else Apple's MPS, else the CPU.

    Raises:
        InputError: a device that PyTorch does not know or does not have here.
    """
    if device != "auto":
        try:
            chosen = torch.device(device)
            torch.empty(0, device=chosen)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(
                f"device {str(device)!r} cannot be used: {reason} Valid here: auto, cpu, cuda, mps."
            ) from None
        return chosen
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def choose_precision(precision: str, device: torch.device) -> Precision:
    """`auto` is bf16 on a GPU that computes in it, else fp32.

    Raises:
        InputError: fp16, in which DINOv3's activations overflow, or a name that is none.
    """
    match precision:
        case "fp32" | "bf16":
            return precision
        case "auto":
            return (
                "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
            )
        case "fp16":
            raise InputError("precision 'fp16': DINOv3's activations overflow it (dinov3#181). Use 'bf16' or 'fp32'.")
        case _:
            raise UnknownNameError("precision", precision, ["auto", "fp32", "bf16"])


def mixed_bf16(model: ModuleT) -> ModuleT:
    """A copy whose matrix products are bfloat16; norms, residual stream, LayerScale and RoPE are float32.

    What has its type already is shared with `model`, so that a large bfloat16 file stays mapped and is not copied.
    """
    memo: dict[int, Tensor] = {}
    for module in model.modules():
        dtype = torch.bfloat16 if isinstance(module, nn.Linear) else torch.float32
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            cast = tensor.detach().to(dtype)
            memo[id(tensor)] = nn.Parameter(cast, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else cast
    return copy.deepcopy(model, memo)


class EagerEngine:
    """Pixels of one size in, tokens of the asked blocks out; no gradients."""

    name = "eager"

    def __init__(self, model: VisionTransformer | ConvNeXt, *, device: torch.device, precision: Precision) -> None:
        self.device = device
        self.precision = precision
        self.model = model.to(device) if precision == "bf16" else model.to(device, torch.float32)
        self._runner = mixed_bf16(self.model) if precision == "bf16" else self.model

    def __call__(self, pixels: Tensor, *, layers: Sequence[int] = (-1,), norm: bool = True) -> list[LayerTokens]:
        """Run [B, C, H, W] (H and W multiples of the stride) and return the blocks `layers`, in that order, float32.

        Raises:
            InputError: the model is in training mode, or the input or an index does not fit the model.
        """
        if self.model.training or self._runner.training:
            raise InputError(
                "the model is in training mode, in which RoPE and stochastic depth may be random: "
                "features would change from call to call. Call .model.eval() first."
            )
        block_indices(layers, self.model.depth)
        with torch.no_grad():  # not inference_mode: a head may be trained on these tokens
            blocks = self._blocks(pixels.to(self.device, non_blocking=True), layers, norm=norm)
        height, width = pixels.shape[2] // self.model.stride, pixels.shape[3] // self.model.stride
        return [self._typed(block, height, width) for block in blocks]

    def _blocks(self, pixels: Tensor, layers: Sequence[int], *, norm: bool) -> Sequence[Tensor | tuple[Tensor, ...]]:
        """Patches [B, N, D], CLS and registers of each block asked."""
        return self._runner.get_intermediate_layers(
            pixels, n=list(layers), norm=norm, return_class_token=True, return_extra_tokens=True
        )

    def _typed(self, block: Tensor | tuple[Tensor, ...], height: int, width: int) -> LayerTokens:
        patches, cls, registers = (t.float() for t in block)
        finer = round((patches.shape[1] / (height * width)) ** 0.5)  # early ConvNeXt stages have a finer grid
        return LayerTokens(patches.unflatten(1, (height * finer, width * finer)), cls, registers)
