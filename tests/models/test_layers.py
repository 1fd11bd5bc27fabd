from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from densedino.models.draws import Kept
from densedino.models.layers import GatedMlp, Linear, attention, linear_gelu, residual


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_inference_kernels_give_what_training_kernels_give(dtype: torch.dtype, bias: bool) -> None:
    layer = Linear(64, 96, bias=bias).to(dtype)
    x = torch.randn(2, 33, 64, dtype=dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    with torch.inference_mode():
        fast, fast_gelu = layer(x), linear_gelu(layer, x)
    torch.testing.assert_close(fast, layer(x), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(fast_gelu, F.gelu(layer(x)), rtol=tolerance, atol=tolerance)


def test_a_hook_on_the_first_ffn_layer_sees_its_own_output() -> None:
    layer = Linear(8, 8)
    seen = []
    layer.register_forward_hook(lambda *args: seen.append(args[2]))
    x = torch.randn(3, 8)
    with torch.inference_mode():
        out = linear_gelu(layer, x)
    torch.testing.assert_close(seen[0], F.linear(x, layer.weight, layer.bias))
    torch.testing.assert_close(out, F.gelu(seen[0]))


def test_bfloat16_weights_take_float32_activations() -> None:
    layer = Linear(8, 8).bfloat16()
    assert layer(torch.randn(3, 8)).dtype == torch.bfloat16


@pytest.mark.parametrize("tokens", [1, 7, 201, 700])
@pytest.mark.parametrize("head_dim", [16, 64])
def test_blockwise_bfloat16_attention_is_attention(tokens: int, head_dim: int) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, tokens, 3, head_dim).transpose(1, 2) for _ in range(3))
    k = k + 3.0  # a component that all keys share changes nothing
    with torch.inference_mode():
        fast = attention(*(t.bfloat16() for t in (q, k, v))).float()
    exact = F.scaled_dot_product_attention(*(t.bfloat16().float() for t in (q, k, v)))
    assert F.cosine_similarity(fast, exact, dim=-1).min() > 0.9995


def test_a_branch_is_run_on_the_samples_that_keep_it() -> None:
    x, weight = torch.randn(5, 3, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)
    kept = torch.tensor([0, 3])
    out = residual(x, lambda part: part @ weight, Kept(kept, 1.25))
    factor = torch.tensor([1.25, 0, 0, 1.25, 0]).view(5, 1, 1)
    expected = x + factor * (x @ weight)
    torch.testing.assert_close(out, expected)
    for ours, theirs in zip(
        torch.autograd.grad(out.square().sum(), (x, weight)),
        torch.autograd.grad(expected.square().sum(), (x, weight)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)
    nobody = torch.tensor([], dtype=torch.int64)
    torch.testing.assert_close(residual(x, lambda part: part @ weight, Kept(nobody, 1.25)), x)
    assert residual(x.detach(), lambda part: part.bfloat16(), Kept(kept, 1.0)).dtype == torch.float32


def test_a_layer_whose_forward_is_replaced_is_called():
    layer = Linear(8, 8)
    layer.requires_grad_(False)
    layer.forward = lambda x: torch.full_like(x, 3.0)
    with torch.no_grad():
        assert torch.equal(linear_gelu(layer, torch.zeros(2, 8)), torch.nn.functional.gelu(torch.full((2, 8), 3.0)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gate_in_place_is_the_same_and_leaves_its_input(dtype: torch.dtype) -> None:
    mlp = GatedMlp(32, 64).to(dtype).requires_grad_(False)
    x = torch.randn(2, 5, 32, dtype=dtype)
    before = x.clone()
    wanted = mlp(x)
    with torch.no_grad():
        assert torch.equal(mlp(x), wanted)
    assert torch.equal(x, before)
