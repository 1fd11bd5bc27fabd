"""Owns the parts of a transformer block: linear maps, attention with RoPE, feed-forwards, LayerScale, stochastic depth.

Shapes: B images, N tokens (prefix tokens first), D embed_dim, H heads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from densedino.models import kernels
from densedino.models.rope import rotate

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from densedino.models.draws import Kept

__all__ = [
    "Attention",
    "Block",
    "GatedMlp",
    "LayerScale",
    "Linear",
    "MaskedBiasLinear",
    "Mlp",
    "attention",
    "linear",
    "linear_gelu",
    "residual",
]


def _in_bf16() -> bool:
    return torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16


def _is_plain_inference() -> bool:
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing())  # type: ignore[attr-defined]


# PyTorch sends fp32 `F.linear` on x86 to MKL, which uses half of an AMD core; oneDNN, in the same wheel, does not.
# Its operator is the one that TorchInductor emits. It has no gradient: training has `kernels`. In float32 it sums in
# another order than MKL; in the wide models that adds up to more than 1e-5 between implementations, so those stay.
def _takes_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        kernels.HAS_ONEDNN
        and _is_plain_inference()
        and x.device.type == weight.device.type == "cpu"
        and (weight.dtype == torch.bfloat16 or (weight.dtype == torch.float32 and min(weight.shape) < 1024))
        and x.numel() > 0
        and type(weight) in (Tensor, nn.Parameter)  # quantised and distributed weights bring their own kernels
        and not torch.is_autocast_enabled("cpu")
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x @ weight.T + bias`, by the fastest kernel that is right here. x [..., in], weight [out, in].

    The product is computed in the weight's dtype: bfloat16 weights in a float32 model are how mixed precision is asked.
    """
    if not torch.is_autocast_enabled(x.device.type):
        x = x.to(weight.dtype)
    if _takes_onednn(x, weight):
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return out
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    """`nn.Linear` through `linear`, and in training on a CPU through its kernel."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (nn.Linear's name)
        """[..., in_features] -> [..., out_features]."""
        if self.training and torch.is_grad_enabled() and kernels.fit(self, input) and not _in_bf16():
            return kernels.linear(input, self.weight, self.bias)
        return linear(input, self.weight, self.bias)


class MaskedBiasLinear(Linear):
    """The fused qkv projection whose key bias is always zero, as in every released DINOv3 ViT.

    `bias_mask` stands in the state dict because released checkpoints have it; its values are known, so a file's
    are not taken (some hold NaN).
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias=bias)
        if bias:
            self.bias_mask = nn.Buffer(torch.empty(out_features))

    def reset_mask(self) -> None:
        """Ones for queries and values, zeros for keys."""
        if self.bias is not None:
            third = self.out_features // 3
            self.bias_mask.fill_(1.0)
            self.bias_mask[third : 2 * third] = 0.0

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """[..., in_features] -> [..., out_features]."""
        return linear(input, self.weight, None if self.bias is None else self.bias * self.bias_mask)


def linear_gelu(layer: nn.Module, x: Tensor) -> Tensor:
    """`gelu(layer(x))` (exact GELU), in one pass over the result where nothing looks at what lies between."""
    watched = layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer)  # accelerate replaces it
    if type(layer) is Linear and not watched and _takes_onednn(x, layer.weight):
        x = x.to(layer.weight.dtype)
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, layer.weight, layer.bias, "gelu", [], "none")
        return out
    return F.gelu(layer(x))


_SCORE_BYTES = 1 << 20  # of attention scores at a time: what a core's second-level cache holds


def _attention_bf16_cpu(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of bfloat16 [B, H, N, d] by blocks of queries: 1.4 to 2 times PyTorch's fused CPU kernel.

    Scores are rounded to bfloat16, so keys are centred first: that shifts all scores of a query alike, which softmax
    does not see, and leaves smaller numbers to round.
    """
    B, H, N, d = q.shape
    k = k - k.mean(dim=2, keepdim=True, dtype=torch.float32).to(k.dtype)
    q, k, v = (q * d**-0.5).reshape(B * H, N, d), k.reshape(B * H, N, d).transpose(1, 2), v.reshape(B * H, N, d)
    rows = min(N, 256)
    heads = max(1, _SCORE_BYTES // (rows * N * q.element_size()))
    out = torch.empty_like(q)
    for h in range(0, B * H, heads):
        for i in range(0, N, rows):
            scores = torch.bmm(q[h : h + heads, i : i + rows], k[h : h + heads])
            torch.bmm(scores.softmax(dim=-1), v[h : h + heads], out=out[h : h + heads, i : i + rows])
    return out.view(B, H, N, d)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scaled dot-product attention, [B, H, N, d] each, by the fastest kernel that is right here."""
    if q.dtype == torch.bfloat16 and q.device.type == "cpu" and _is_plain_inference():
        return _attention_bf16_cpu(q, k, v)
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    """Multi-head self-attention; queries and keys of patch tokens are rotated by `rope`."""

    def __init__(self, dim: int, *, num_heads: int, head_dim: int, qkv_bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.qkv = MaskedBiasLinear(dim, 3 * num_heads * head_dim, bias=qkv_bias)
        self.proj = Linear(num_heads * head_dim, dim)

    def _queries_keys_values(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, self.head_dim))
        q, k = rotate(qkv[:, :, :2], rope).unbind(2)
        return q.transpose(1, 2), k.transpose(1, 2), qkv[:, :, 2].transpose(1, 2)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        q, k, v = self._queries_keys_values(x, rope)
        out = attention(q, k, v)
        return self.proj(out.transpose(1, 2).flatten(2))

    def weights(self, x: Tensor, rope: tuple[Tensor, Tensor], queries: slice) -> Tensor:
        """The rows `queries` of the attention map, each summing to 1: [B, N, D] -> [B, H, Q, N] float32."""
        q, k, _ = self._queries_keys_values(x, rope)
        return (q[:, :, queries].float() @ k.float().transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)


class Mlp(nn.Module):
    """Linear, exact GELU, linear."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden_dim)
        self.fc2 = Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        return self.fc2(linear_gelu(self.fc1, x))


class GatedMlp(nn.Module):
    """SwiGLU: w3(silu(w1 x) * w2 x)."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden_dim)  # not `Linear`: a product of two sums feels their order of summation more
        self.w2 = nn.Linear(dim, hidden_dim)
        self.w3 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        x = x.to(self.w1.weight.dtype)
        if _is_plain_inference() and not self.w1._forward_hooks:  # in place: half the memory of a block
            return self.w3(F.silu(self.w1(x), inplace=True).mul_(self.w2(x)))
        return self.w3(F.silu(self.w1(x)) * self.w2(x))


class LayerScale(nn.Module):
    """A learned factor per channel on a residual branch."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(dim))

    def forward(self, branch: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return branch * self.gamma


def residual(x: Tensor, branch: Callable[[Tensor], Tensor], kept: Kept | None = None) -> Tensor:
    """`x + branch(x)` for x [B, ...]; with stochastic depth the branch is run only on the samples that keep it."""
    if kept is None:
        out = branch(x)
        return out.add_(x) if out.dtype == x.dtype else x + out  # rounded after the product, as elsewhere
    if not len(kept.samples):
        return x
    out = branch(x.index_select(0, kept.samples))
    dtype = torch.result_type(x, out)
    return x.to(dtype).index_add(0, kept.samples, out.to(dtype), alpha=kept.scale)


class Block(nn.Module):
    """Pre-norm transformer block with LayerScale on both branches."""

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        head_dim: int,
        hidden_dim: int,
        ffn: Literal["mlp", "swiglu"],
        qkv_bias: bool,
        norm_eps: float,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = Attention(dim, num_heads=num_heads, head_dim=head_dim, qkv_bias=qkv_bias)
        self.ls1 = LayerScale(dim)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = (Mlp if ffn == "mlp" else GatedMlp)(dim, hidden_dim)
        self.ls2 = LayerScale(dim)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        kept: Sequence[Kept] | None = None,
        *,
        rows: Tensor | None = None,
    ) -> Tensor:
        """[B, N, D] -> [B, N, D].

        Args:
            x: tokens.
            rope: tables of the grid.
            kept: stochastic depth of the two branches.
            rows: [M] int64, of the B·N tokens: those that are wanted, as [M, D]. All of them for None.
        """
        wanted = rows is not None or (self.training and torch.is_grad_enabled()) or _in_bf16()
        if wanted and kernels.fit(self, x) and all(type(m) in _WITH_KERNELS for m in self.modules() if m is not self):
            return self._by_kernels(x, rope, kept, rows)
        first, second = kept or (None, None)
        x = residual(x, lambda x: self.ls1(self.attn(self.norm1(x), rope)), first)
        x = residual(x, lambda x: self.ls2(self.mlp(self.norm2(x))), second)
        return x if rows is None else x.flatten(0, 1)[rows]

    def _by_kernels(
        self, x: Tensor, rope: tuple[Tensor, Tensor], kept: Sequence[Kept] | None, rows: Tensor | None
    ) -> Tensor:
        first, second = kept or (None, None)
        x = x.float()
        (B, N, _), attn, mlp = x.shape, self.attn, self.mlp
        assert isinstance(mlp, Mlp)
        tokens = x.flatten(0, 1) if rows is None else x.flatten(0, 1)[rows]
        if first is None or len(first.samples):
            bias = None if attn.qkv.bias is None else attn.qkv.bias * attn.qkv.bias_mask
            seen = x if first is None else x.index_select(0, first.samples)
            branch = kernels.attend(
                seen, self.norm1, attn.qkv.weight, bias, rope=rope, num_heads=attn.num_heads
            ).flatten(0, 1)
            places, source = (None, rows) if first is None else _kept_rows(first.samples, B, N, rows)
            branch = branch if source is None else branch[source]
            out = kernels.add_linear(
                _take(tokens, places),
                branch,
                attn.proj.weight,
                attn.proj.bias,
                self.ls1.gamma,
                scale=1.0 if first is None else first.scale,
            )
            tokens = _put(tokens, places, out)
        if second is None or len(second.samples):
            places = None if second is None else _kept_rows(second.samples, B, N, rows)[0]
            out = kernels.add_mlp(
                _take(tokens, places),
                self.norm2,
                mlp.fc1,
                mlp.fc2,
                self.ls2.gamma,
                scale=1.0 if second is None else second.scale,
            )
            tokens = _put(tokens, places, out)
        return tokens if rows is not None else tokens.view_as(x)


_WITH_KERNELS = frozenset({nn.LayerNorm, Attention, MaskedBiasLinear, Linear, Mlp, LayerScale})


def _kept_rows(samples: Tensor, B: int, N: int, rows: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Where the tokens of kept samples stand among the wanted `rows` of B·N, and among the tokens of those samples.

    The latter is None if it is all of them in order.
    """
    if rows is None:
        return (samples[:, None] * N + torch.arange(N, device=samples.device)).flatten(), None
    number = samples.new_full((B,), -1)
    number[samples] = torch.arange(len(samples), device=samples.device)
    sample = number[rows // N]
    places = (sample >= 0).nonzero()[:, 0]
    return places, sample[places] * N + rows[places] % N


def _take(tokens: Tensor, places: Tensor | None) -> Tensor:
    return tokens if places is None else tokens.index_select(0, places)


def _put(tokens: Tensor, places: Tensor | None, new: Tensor) -> Tensor:
    return new if places is None else tokens.index_copy(0, places, new)
