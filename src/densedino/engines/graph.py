"""Owns the backbone as a graph: one image in, named tokens out, with dynamic batch, height and width.

The same arithmetic as `densedino.models`, spelled so that compilers find their fused kernels in it: rotation out of
place, attention as one operator, RoPE tables computed inside from the shape.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from densedino.errors import InputError
from densedino.models.convnext import ConvNeXt, ConvNeXtBlock
from densedino.models.layers import Block, GatedMlp, Mlp
from densedino.models.rope import rope_angles, rope_coords, rope_periods
from densedino.models.vit import VisionTransformer, block_indices

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.export import ExportedProgram

__all__ = ["INPUT", "Graph", "Normalise", "export_graph", "output_names"]

INPUT = "image"


@dataclass(frozen=True, kw_only=True)
class Normalise:
    """Preprocessing inside the graph: the image comes as bytes, or as floats in [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    uint8: bool
    """[0, 255] in uint8, instead of [0, 1] in float32."""


class Graph(nn.Module):
    """`image` [B, C, H, W] to a tuple of tokens, one by one as `names` says.

    For each block asked, and each of `norms`: cls [B, D], registers [B, R, D] (if any), patches [B, h, w, D].
    """

    def __init__(
        self,
        model: VisionTransformer | ConvNeXt,
        *,
        layers: Sequence[int] = (-1,),
        norms: Sequence[bool] = (True,),
        before: Normalise | None = None,
    ) -> None:
        """Hold the model's own parameters, not copies.

        Args:
            model: in eval mode; in float32, or with bfloat16 linear layers (`eager.mixed_bf16`).
            layers: blocks whose tokens come out, negative ones from the end.
            norms: True for tokens after the model's final norm, False for the raw ones; or both.
            before: normalise inside; without it `image` comes normalised.

        Raises:
            InputError: an index that is no block, or a model with parts that are not the catalogue's.
        """
        super().__init__()
        _check_parts(model)
        self.model = model
        self.layers = tuple(block_indices(layers, model.depth))
        self.norms = tuple(norms)
        self.uint8 = before is not None and before.uint8
        if before is not None:
            self.mean = nn.Buffer(torch.tensor(before.mean)[:, None, None])
            self.std = nn.Buffer(torch.tensor(before.std)[:, None, None])
        self.normalises = before is not None

    @property
    def names(self) -> list[str]:
        """Of the outputs, each once; those of one block and norm are `output_names`."""
        asked = [name for i in self.layers for norm in self.norms for name in output_names(self.model, i, norm=norm)]
        return list(dict.fromkeys(asked))

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """[B, C, H, W] to the outputs that `names` lists; H and W are multiples of the stride."""
        if self.uint8:
            image = image.to(torch.float32) / 255.0
        if self.normalises:
            image = (image - self.mean) / self.std
        model = self.model
        outputs = self._convnext(model, image) if isinstance(model, ConvNeXt) else self._vit(model, image)
        return tuple(outputs[name] for name in self.names)

    def _convnext(self, model: ConvNeXt, image: Tensor) -> dict[str, Tensor]:
        outputs: dict[str, Tensor] = {}
        x = image
        for i in range(max(self.layers) + 1):
            x = model.downsample_layers[i](x)
            for block in cast("Sequence[ConvNeXtBlock]", model.stages[i]):
                x = _convnext_block(block, x)
            tokens = x.permute(0, 2, 3, 1)
            cls = tokens.mean(dim=(1, 2))
            for norm in self.norms:
                normed = norm and i == model.depth - 1
                parts = (model.norm(cls), model.norm(tokens)) if normed else (cls, tokens)
                outputs.update(zip(output_names(model, i, norm=norm), parts, strict=True))
        return outputs

    def _vit(self, model: VisionTransformer, image: Tensor) -> dict[str, Tensor]:
        patches = model.patch_embed.proj(image)
        height, width = patches.shape[2:]
        prefix: list[Tensor] = [model.cls_token]
        prefix += [model.storage_tokens] if model.num_register_tokens else []
        count = 1 + model.num_register_tokens
        start = torch.cat(prefix, dim=1).expand(image.shape[0], -1, -1)
        x = torch.cat([start, patches.flatten(2).transpose(1, 2)], dim=1)
        rope = _tables(model, height, width)
        outputs: dict[str, Tensor] = {}
        for i in range(max(self.layers) + 1):
            x = _block(model.blocks[i], x, rope)
            for norm in self.norms if i in self.layers else ():
                tokens = model.norm(x) if norm else x
                registers = (tokens[:, 1:count],) if count > 1 else ()
                parts = (tokens[:, 0], *registers, tokens[:, count:].unflatten(1, (height, width)))
                outputs.update(zip(output_names(model, i, norm=norm), parts, strict=True))
        return outputs


def output_names(model: VisionTransformer | ConvNeXt, layer: int, *, norm: bool) -> list[str]:
    """cls, registers, patches of the last block; layer_3_cls … of block 3; prenorm_cls … without the final norm.

    Early stages of a ConvNeXt have no norm, and so one name for both.
    """
    parts = ["cls", "registers", "patches"] if model.num_register_tokens else ["cls", "patches"]
    last = layer == model.depth - 1
    raw = not norm and (last or isinstance(model, VisionTransformer))
    prefix = ("prenorm_" if raw else "") + ("" if last else f"layer_{layer}_")
    return [prefix + part for part in parts]


def _check_parts(model: nn.Module) -> None:
    """Refuse what would be left out of the graph without a sign: adapters, hooks, other blocks."""
    if isinstance(model, VisionTransformer):
        for block in model.blocks:
            linears = [module for module in block.modules() if isinstance(module, nn.Linear)]
            if type(block) is not Block or len(linears) != (5 if isinstance(block.mlp, GatedMlp) else 4):
                raise InputError("the backbone's blocks have been changed; run it with engine='eager'.")
    hooked = [name for name, module in model.named_modules() if module._forward_hooks or module._forward_pre_hooks]
    if hooked:
        raise InputError(
            f"the backbone has forward hooks (on {hooked[0] or 'itself'}), which only engine='eager' runs."
        )


def _tables(model: VisionTransformer, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines [1, 1, T, head_dim], float32; prefix tokens have angle 0."""
    rope = model.rope_embed
    device = model.cls_token.device
    coords = rope_coords(height, width, device)
    angles = rope_angles(coords, rope_periods(rope.head_dim, rope.base, device))
    angles = F.pad(angles, (0, 0, rope.num_prefix_tokens, 0))
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1)[None, None], torch.cat([sin, sin], dim=-1)[None, None]


def _rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = rope
    half = x.shape[-1] // 2
    return (x * cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin).to(x.dtype)


def _block(block: Block, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """[B, N, D] -> [B, N, D]."""
    attn = block.attn
    B, N, _ = x.shape
    bias = None if attn.qkv.bias is None else attn.qkv.bias * attn.qkv.bias_mask
    qkv = F.linear(block.norm1(x).to(attn.qkv.weight.dtype), attn.qkv.weight, bias)
    q, k, v = qkv.view(B, N, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
    mixed = F.scaled_dot_product_attention(_rotate(q, rope), _rotate(k, rope), v)
    x = x + _linear(attn.proj, mixed.transpose(1, 2).flatten(2)) * block.ls1.gamma
    return x + _mlp(block.mlp, block.norm2(x)) * block.ls2.gamma


def _convnext_block(block: ConvNeXtBlock, x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, C, H, W]."""
    branch = block.norm(block.dwconv(x).permute(0, 2, 3, 1))
    branch = _linear(block.pwconv2, F.gelu(_linear(block.pwconv1, branch))) * block.gamma
    return x + branch.permute(0, 3, 1, 2)


def _mlp(mlp: Mlp | GatedMlp, x: Tensor) -> Tensor:
    if isinstance(mlp, GatedMlp):
        return _linear(mlp.w3, F.silu(_linear(mlp.w1, x)) * _linear(mlp.w2, x))
    return _linear(mlp.fc2, F.gelu(_linear(mlp.fc1, x)))


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x.to(layer.weight.dtype), layer.weight, layer.bias)


def export_graph(
    graph: Graph, *, batch: int | None = None, height: int | None = None, width: int | None = None
) -> ExportedProgram:
    """`torch.export` of a graph; every size that is not given stays dynamic, from two patches on.

    PyTorch treats a size of one apart; OpenVINO and ONNX Runtime run the graph at one patch too.

    Args:
        graph: its model on the CPU, or on meta for shapes alone.
        batch: images, if always the same number.
        height: pixels, if always the same; a multiple of the stride.
        width: likewise.

    Raises:
        InputError: a size that the model cannot take.
    """
    model = graph.model
    stride = model.stride
    for name, value, unit in (("batch", batch, 1), ("height", height, stride), ("width", width, stride)):
        if value is not None and (value < unit or value % unit):
            raise InputError(f"{name} {value}: give a positive multiple of {unit}, or nothing for any size.")
    device = next(model.parameters()).device
    shape = (batch or 2, model.in_chans, height or 3 * stride, width or 5 * stride)
    example = torch.zeros(shape, device=device, dtype=torch.uint8 if graph.uint8 else torch.float32)
    dim = torch.export.Dim
    dynamic = {
        0: dim("batch", min=1, max=2**16) if batch is None else None,
        2: stride * dim("rows", min=2, max=2**12) if height is None else None,
        3: stride * dim("columns", min=2, max=2**12) if width is None else None,
    }
    with torch.no_grad():
        return torch.export.export(graph, (example,), dynamic_shapes={INPUT: dynamic})
