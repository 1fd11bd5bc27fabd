"""Owns the CPU training kernels: a transformer block's parts with their gradients, each as one autograd function.

Autograd keeps what each operator reads: some 30 numbers per token and channel for a block. These functions keep 10 (the
inputs of the two branches, queries, keys, values, the attention's output and the hidden layer) and remake the rest
where it is cheap: norms and GELU. LayerScale and stochastic depth's factor go into the weights, where they are free:
for y = γ·(W a), dW = γ·P and dγ = Σ W·P with the same product P = dyᵀ a. Products go to oneDNN, which in fp32 on
AVX-512 cores of AMD is twice as fast as what PyTorch takes. bf16 is that of autocast: products in bf16, the rest fp32.

Shapes: B images, N tokens, T = B·N or chosen ones of them, D channels, H heads, d = D/H.
"""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from densedino.models.rope import rotate

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["HAS_ONEDNN", "add_linear", "add_mlp", "attend", "fit", "linear", "product", "weight_gradient"]

HAS_ONEDNN = torch.backends.mkldnn.is_available() and platform.machine().lower() in {"x86_64", "amd64"}
_SCORES = 1 << 19  # of an attention map at a time: in bf16, what a core's second-level cache holds


def _compute_dtype(x: Tensor) -> torch.dtype:
    """What products are computed in here: autocast's dtype, or that of the tokens."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


def fit(module: nn.Module, x: Tensor) -> bool:
    """Whether the kernels may stand for `module` on `x`: fp32 on a CPU, ordinary weights, nothing looking inside."""
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16 if torch.is_autocast_enabled("cpu") else torch.float32)
        and not (torch.compiler.is_compiling() or torch.jit.is_tracing())  # type: ignore[attr-defined]
        and all(p.dtype == torch.float32 and type(p) in (Tensor, nn.Parameter) for p in module.parameters())
        and not any(_is_watched(part) for child in module.children() for part in child.modules())
    )


def _is_watched(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias` without gradient: x [T, i], weight [o, i] of one dtype, transposed views welcome."""
    if HAS_ONEDNN and x.device.type == "cpu" and x.numel() and x.dtype != torch.float64:
        x, weight = _dense(x), _dense(weight)
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return out
    return F.linear(x, weight, bias)


def _dense(x: Tensor) -> Tensor:
    """`x` [m, n], copied if it is neither whole rows nor whole columns: oneDNN takes a thousand times as long there."""
    return x if x.is_contiguous() or x.t().is_contiguous() else x.contiguous()


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """`grad.T @ x` of [T, o] and [T, i]; in fp32 for bf16."""
    return (grad.t() @ x).float() if grad.dtype == torch.bfloat16 else product(grad.t(), x.t())


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` in fp32, forward and backward by `product`. x [..., i], weight [o, i]."""
    out: Tensor = _Linear.apply(x.reshape(-1, x.shape[-1]), weight, bias)
    return out.unflatten(0, x.shape[:-1])


def attend(
    x: Tensor, norm: nn.LayerNorm, weight: Tensor, bias: Tensor | None, *, rope: tuple[Tensor, Tensor], num_heads: int
) -> Tensor:
    """Self-attention of `norm(x)` before its output projection: x [B, N, D] fp32 → [B, N, H·d] in the compute dtype.

    Args:
        x: tokens.
        norm: before the projection.
        weight: of queries, keys and values [3·H·d, D].
        bias: [3·H·d] or None.
        rope: tables, as `densedino.models.rope.rotate` takes them.
        num_heads: H.
    """
    options = (norm.eps, rope, num_heads, _compute_dtype(x))
    with torch.autocast("cpu", enabled=False):
        return _Attend.apply(x, norm.weight, norm.bias, weight, bias, options)


def add_linear(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor, *, scale: float = 1.0) -> Tensor:
    """`x + scale · γ · (branch @ weight.T + bias)`: x [T, D] fp32, branch [T, i] in the compute dtype, γ [D]."""
    with torch.autocast("cpu", enabled=False):
        return _AddLinear.apply(x, branch, weight, bias, gamma, scale)


def add_mlp(
    x: Tensor, norm: nn.LayerNorm, first: nn.Linear, second: nn.Linear, gamma: Tensor, *, scale: float = 1.0
) -> Tensor:
    """`x + scale · γ · second(gelu(first(norm(x))))`: x [T, D] fp32, γ [D]."""
    options = (norm.eps, scale, _compute_dtype(x))
    with torch.autocast("cpu", enabled=False):
        return _AddMlp.apply(
            x, norm.weight, norm.bias, first.weight, first.bias, second.weight, second.bias, gamma, options
        )


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            product(grad, weight.t()) if needs_x else None,
            weight_gradient(grad, x) if needs_weight else None,
            grad.sum(0) if needs_bias else None,
        )


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, bias: Tensor | None, options: tuple[Any, ...]
    ) -> Tensor:
        eps, rope, num_heads, dtype = ctx.options = options
        B, N, D = x.shape
        d = len(weight) // (3 * num_heads)
        normed, mean, rstd = torch.native_layer_norm(x, (D,), scale, shift, eps)
        qkv = product(normed.to(dtype).flatten(0, 1), weight.to(dtype), None if bias is None else bias.to(dtype))
        qkv = qkv.view(B, N, 3, num_heads, d)
        heads = qkv.new_empty(3, B, num_heads, N, d)
        q, k = rotate(qkv[:, :, :2].to(x.dtype), rope).permute(2, 0, 3, 1, 4)
        torch.mul(q, d**-0.5, out=heads[0])
        # A part that all keys share shifts a query's scores alike, which softmax does not see; without it bf16 rounds
        # smaller numbers.
        torch.sub(k, k.mean(2, keepdim=True), out=heads[1])
        heads[2] = qkv[:, :, 2].transpose(1, 2)
        out = _attention(*heads.flatten(1, 2)).view(B, num_heads, N, d)
        ctx.save_for_backward(x, mean, rstd, scale, shift, weight, heads)
        return out.transpose(1, 2).flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, scale, shift, weight, heads = ctx.saved_tensors
        eps, (cos, sin), num_heads, dtype = ctx.options
        B, N, D = x.shape
        grads = torch.empty_like(heads)
        grad = grad.unflatten(-1, (num_heads, -1)).transpose(1, 2).flatten(0, 1)
        _attention_backward(grad, *heads.flatten(1, 2), out=grads.flatten(1, 2))
        grads[0] *= heads.shape[-1] ** -0.5
        grads = grads.permute(1, 3, 0, 2, 4)
        back = torch.empty(B, N, *grads.shape[2:], dtype=dtype)
        back[:, :, :2] = rotate(grads[:, :, :2].to(x.dtype), (cos, -sin))
        back[:, :, 2] = grads[:, :, 2]
        back = back.view(B * N, -1)
        _, _, _, needs_weight, needs_bias, _ = ctx.needs_input_grad
        normed = torch.native_layer_norm(x, (D,), scale, shift, eps)[0].to(dtype).flatten(0, 1) if needs_weight else x
        return (
            *_norm_backward(product(back, weight.to(dtype).t()).view(B, N, D), x, mean, rstd, scale, shift, ctx),
            weight_gradient(back, normed) if needs_weight else None,
            back.sum(0, dtype=x.dtype) if needs_bias else None,
            None,
        )


def _norm_backward(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, scale: Tensor, shift: Tensor, ctx: Any
) -> tuple[Tensor | None, ...]:
    """Gradients of the norm's input, scale and shift, which are the first three inputs of `ctx`' function."""
    mask = list(ctx.needs_input_grad[:3])
    found: tuple[Tensor | None, ...] = torch.ops.aten.native_layer_norm_backward(
        grad.to(x.dtype), x, x.shape[-1:], mean, rstd, scale, shift, mask
    )
    return found


def _blocks(groups: int, tokens: int) -> Iterator[tuple[slice, slice]]:
    """Cut [groups, tokens] queries so that a block's scores stay in the cache."""
    rows = min(tokens, max(64, _SCORES // tokens))
    size = max(1, _SCORES // (rows * tokens))
    for group in range(0, groups, size):
        for row in range(0, tokens, rows):
            yield slice(group, group + size), slice(row, row + rows)


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention of scaled queries, keys and values [G, N, d]."""
    out = torch.empty_like(q)
    for group, rows in _blocks(*q.shape[:2]):
        weights = torch.bmm(q[group, rows], k[group].transpose(1, 2)).softmax(-1)
        torch.bmm(weights, v[group], out=out[group, rows])
    return out


def _attention_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *, out: Tensor) -> None:
    """Gradients of q, k and v into `out` [3, G, N, d], from that of the output; attention weights are remade."""
    sums = torch.zeros(2, *k.shape) if len({rows.start for _, rows in _blocks(*q.shape[:2])}) > 1 else out[1:]
    for group, rows in _blocks(*q.shape[:2]):
        queries, above = q[group, rows], grad[group, rows]
        weights = torch.bmm(queries, k[group].transpose(1, 2)).softmax(-1)
        inner = torch.bmm(above, v[group].transpose(1, 2))
        inner = torch._softmax_backward_data(inner, weights, -1, weights.dtype)
        torch.bmm(inner, k[group], out=out[0, group, rows])
        to_k, to_v = torch.bmm(inner.transpose(1, 2), queries), torch.bmm(weights.transpose(1, 2), above)
        if sums.dtype == out.dtype and sums.data_ptr() == out[1:].data_ptr():
            sums[0, group], sums[1, group] = to_k, to_v
        else:
            sums[0, group] += to_k
            sums[1, group] += to_v
    out[1:] = sums


class _AddLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor, scale: float
    ) -> Tensor:
        ctx.save_for_backward(branch, weight, bias, gamma)
        ctx.scale = scale
        return _scaled_sum(x, branch, weight, bias, gamma * scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        branch, weight, bias, gamma = ctx.saved_tensors
        scaled = (gamma * ctx.scale)[:, None] * weight
        low = grad.to(branch.dtype)
        return (
            grad,
            product(low, scaled.to(branch.dtype).t()) if ctx.needs_input_grad[1] else None,
            *_scaled_gradients(grad, low, branch, weight, bias, gamma, ctx.scale, ctx.needs_input_grad[2:5]),
            None,
        )


def _scaled_sum(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, factor: Tensor) -> Tensor:
    """`x + factor · (branch @ weight.T + bias)`; the factor goes into the weights."""
    weight, bias = factor[:, None] * weight, factor * bias
    if branch.dtype == x.dtype == torch.float32 and HAS_ONEDNN and x.numel():
        out: Tensor = torch.ops.mkldnn._linear_pointwise.binary(branch, x, weight, bias, "add")
        return out
    return x + product(branch, weight.to(branch.dtype), bias.to(branch.dtype))


def _scaled_gradients(
    grad: Tensor,
    low: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    gamma: Tensor,
    scale: float,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of weight, bias, γ of `scale · γ · (branch @ weight.T + bias)`; `low` is `grad` in branch's dtype."""
    if not any(needs):
        return None, None, None
    shared, total = weight_gradient(low, branch).mul_(scale), grad.sum(0).mul_(scale)
    to_gamma = torch.linalg.vecdot(weight, shared) + bias * total
    return shared.mul_(gamma[:, None]), total.mul_(gamma), to_gamma


class _AddMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        shift: Tensor,
        weight1: Tensor,
        bias1: Tensor,
        weight2: Tensor,
        bias2: Tensor,
        gamma: Tensor,
        options: tuple[Any, ...],
    ) -> Tensor:
        eps, factor, dtype = ctx.options = options
        normed, mean, rstd = torch.native_layer_norm(x, x.shape[1:], scale, shift, eps)
        hidden = product(normed.to(dtype), weight1.to(dtype), bias1.to(dtype))
        ctx.save_for_backward(x, mean, rstd, scale, shift, weight1, weight2, bias2, gamma, hidden)
        return _scaled_sum(x, F.gelu(hidden), weight2, bias2, gamma * factor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, scale, shift, weight1, weight2, bias2, gamma, hidden = ctx.saved_tensors
        eps, factor, dtype = ctx.options
        needs = ctx.needs_input_grad
        low = grad.to(dtype)
        second = _scaled_gradients(grad, low, F.gelu(hidden), weight2, bias2, gamma, factor, needs[5:8])
        inner = product(low, ((gamma * factor)[:, None] * weight2).to(dtype).t())
        torch.ops.aten.gelu_backward.grad_input(inner, hidden, grad_input=inner)
        normed = torch.native_layer_norm(x, x.shape[1:], scale, shift, eps)[0].to(dtype) if needs[3] else x
        first = (
            weight_gradient(inner, normed) if needs[3] else None,
            inner.sum(0, dtype=x.dtype) if needs[4] else None,
        )
        outer = product(inner, weight1.to(dtype).t())
        to_x, *to_norm = _norm_backward(outer, x, mean, rstd, scale, shift, ctx)
        return to_x if to_x is None else to_x.add_(grad), *to_norm, *first, *second, None
