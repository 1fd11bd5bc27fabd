from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from densedino.models import kernels
from densedino.models.catalog import create_model
from densedino.models.draws import Kept
from densedino.models.layers import Block
from densedino.models.rope import rope_angles, rope_coords, rope_periods

if TYPE_CHECKING:
    from collections.abc import Callable


def tables(h: int, w: int, d: int) -> tuple[Tensor, Tensor]:
    angles = rope_angles(rope_coords(h, w), rope_periods(d, 100.0))
    return angles.cos().tile(2), angles.sin()


def random_block(dim: int = 32, *, qkv_bias: bool = True, seed: int = 0) -> Block:
    torch.manual_seed(seed)
    block = Block(dim, num_heads=2, head_dim=dim // 2, hidden_dim=2 * dim, ffn="mlp", qkv_bias=qkv_bias, norm_eps=1e-5)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    if qkv_bias:
        block.attn.qkv.reset_mask()
    return block.train()


def plain(block: Block, x: Tensor, rope: tuple[Tensor, Tensor], *args: object, **kwargs: object) -> Tensor:
    """The same block by PyTorch's operators: something looks inside."""
    handle = block.norm1.register_forward_hook(lambda *_: None)
    out = block(x, rope, *args, **kwargs)
    handle.remove()
    return out


def results(block: Block, x: Tensor, call: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    block.zero_grad()
    out = call(x)
    torch.manual_seed(1)
    out.backward(torch.randn(out.shape).to(out.dtype))
    return {"out": out.detach(), "x": x.grad, **{name: p.grad for name, p in block.named_parameters()}}  # type: ignore[dict-item]


def assert_alike(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    for name in theirs:
        error = (ours[name] - theirs[name]).norm() / theirs[name].norm().clamp(min=1e-6)
        assert error < tolerance, f"{name}: {error}"


@pytest.mark.parametrize("qkv_bias", [True, False])
def test_a_block_has_the_values_and_gradients_of_plain_operators(qkv_bias: bool) -> None:
    block, x, rope = random_block(qkv_bias=qkv_bias), torch.randn(3, 20, 32), tables(4, 5, 16)
    ours = results(block, x, lambda x: block(x, rope))
    assert_alike(ours, results(block, x, lambda x: plain(block, x, rope)), 1e-5)


def test_in_bfloat16_it_errs_no_more_than_plain_operators() -> None:
    block, x, rope = random_block(64), torch.randn(3, 70, 64), tables(7, 10, 32)
    exact = results(block, x, lambda x: plain(block, x, rope))

    def errors(call: Callable[[Tensor], Tensor]) -> dict[str, float]:
        with torch.autocast("cpu", torch.bfloat16):
            found = results(block, x, call)
        return {name: ((found[name].float() - exact[name]).norm() / exact[name].norm()).item() for name in exact}

    ours, theirs = errors(lambda x: block(x, rope)), errors(lambda x: plain(block, x, rope))
    for name in exact:
        assert ours[name] < max(1.5 * theirs[name], 0.01), name


@pytest.mark.parametrize("kept", [None, ([0, 2], [1]), ([], [0, 1, 2]), ([1], [])])
def test_chosen_rows_with_stochastic_depth_are_rows_of_the_whole(kept: tuple[list[int], list[int]] | None) -> None:
    block, x, rope = random_block(), torch.randn(3, 20, 32), tables(4, 5, 16)
    draws = None if kept is None else [Kept(torch.tensor(k, dtype=torch.int64), 1.5) for k in kept]
    rows = torch.tensor([0, 20, 40, 7, 59, 33])
    whole = results(block, x, lambda x: plain(block, x, rope, draws))
    assert_alike(results(block, x, lambda x: block(x, rope, draws)), whole, 1e-5) if kept is None else None
    torch.testing.assert_close(block(x, rope, draws), whole["out"], rtol=1e-5, atol=1e-5)
    chosen = block(x, rope, draws, rows=rows)
    torch.testing.assert_close(chosen, whole["out"].flatten(0, 1)[rows], rtol=1e-5, atol=1e-5)
    block.zero_grad()
    chosen.sum().backward()
    ours = {name: p.grad for name, p in block.named_parameters()}
    block.zero_grad()
    plain(block, x, rope, draws, rows=rows).sum().backward()
    for name, parameter in block.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-4, atol=1e-4, msg=lambda m: f"{name}: {m}")  # noqa: B023


def test_gradients_are_those_of_the_values() -> None:
    torch.manual_seed(0)
    D, N, B = 8, 6, 2
    x = torch.randn(B, N, D, dtype=torch.float64, requires_grad=True)
    norm = nn.LayerNorm(D).double()
    rope = tuple(t.double() for t in tables(2, 3, 4))
    leaves = [
        torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((3 * D, D), (3 * D,), (D, D), (D,))
    ]
    gamma = torch.randn(D, dtype=torch.float64, requires_grad=True)
    first, second = nn.Linear(D, 2 * D).double(), nn.Linear(2 * D, D).double()

    def block(x: Tensor, qkv: Tensor, bias: Tensor, weight: Tensor, shift: Tensor, gamma: Tensor, *_: Tensor) -> Tensor:
        branch = kernels.attend(x, norm, qkv, bias, rope=rope, num_heads=2).flatten(0, 1)  # type: ignore[arg-type]
        tokens = kernels.add_linear(x.flatten(0, 1), branch, weight, shift, gamma, scale=1.25)
        return kernels.add_mlp(tokens, norm, first, second, gamma, scale=1.25)

    parameters = [*norm.parameters(), *first.parameters(), *second.parameters()]
    torch.autograd.gradcheck(block, (x, *leaves, gamma, *parameters), fast_mode=True)
    torch.autograd.gradcheck(kernels.linear, (x, leaves[0], leaves[1]))


@pytest.mark.parametrize("tokens", [5, 41, 201, 1300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_by_blocks_is_attention(tokens: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q, k, v, grad = (torch.randn(3, tokens, 16) for _ in range(4))
    exact = [t.clone().requires_grad_() for t in (q, k, v)]
    F.scaled_dot_product_attention(*exact, scale=1.0).backward(grad)
    low = [t.to(dtype) for t in (q, k, v)]
    grads = torch.empty(3, *q.shape, dtype=dtype)
    kernels._attention_backward(grad.to(dtype), *low, out=grads)
    out = kernels._attention(*low).float()
    want = F.scaled_dot_product_attention(q, k, v, scale=1.0)
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    assert (out - want).norm() < tolerance * want.norm()
    for ours, t in zip(grads, exact, strict=True):
        assert (ours.float() - t.grad).norm() < tolerance * t.grad.norm()  # type: ignore[union-attr, operator]


def test_frozen_weights_get_no_gradient_and_inputs_still_do() -> None:
    block, x, rope = random_block().requires_grad_(False), torch.randn(2, 20, 32), tables(4, 5, 16)
    want = results(block.requires_grad_(True), x, lambda x: plain(block, x, rope))["x"]
    block.zero_grad()
    seen = x.clone().requires_grad_()
    block.requires_grad_(False)
    out = block(seen, rope)
    torch.manual_seed(1)
    out.backward(torch.randn(out.shape))
    torch.testing.assert_close(seen.grad, want, rtol=1e-4, atol=1e-4)
    assert all(p.grad is None for p in block.parameters())


def test_what_looks_inside_or_replaces_a_part_is_respected() -> None:
    block, x, rope = random_block(), torch.randn(2, 20, 32), tables(4, 5, 16)
    assert kernels.fit(block, x)
    seen: list[Tensor] = []
    handle = block.mlp.fc1.register_forward_hook(lambda *args: seen.append(args[2]))
    assert not kernels.fit(block, x)
    block(x, rope).sum().backward()
    assert seen[0].shape == (2, 20, 64)
    handle.remove()
    block.attn.proj.weight = nn.Parameter(block.attn.proj.weight.bfloat16())
    assert not kernels.fit(block, x)
    block.attn.proj = nn.Sequential(nn.Linear(32, 32), nn.Dropout(0.0))  # type: ignore[assignment]
    assert block(x, rope).shape == x.shape


def test_training_a_whole_backbone_is_the_same_by_either_way() -> None:
    torch.manual_seed(0)
    model = create_model("debug_vit").train()
    x = torch.randn(2, 3, 64, 48)
    grads = []
    for watched in (False, True):
        handles = [block.norm1.register_forward_hook(lambda *_: None) for block in model.blocks if watched]
        model.zero_grad()
        cls, patches = model.training_features(x, patches=torch.tensor([0, 5, 13, 23]))
        (cls.square().sum() + patches.sin().sum()).backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        for handle in handles:
            handle.remove()
    assert_alike(grads[0], grads[1], 1e-4)
