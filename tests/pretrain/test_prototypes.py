"""The losses without logits equal those with logits: value, gradients, any tile and cache size."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from densedino.pretrain import losses
from densedino.pretrain.prototypes import PrototypeTargets, prototype_dino_loss, prototype_ibot_loss


def unit(*shape, generator):
    return F.normalize(torch.randn(*shape, generator=generator), dim=-1)


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(losses, "CPU_TILE", 7)


def relative(a, b):
    return ((a - b).norm() / b.norm().clamp(min=1e-30)).item()


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(0, 2**31),
    st.integers(1, 9),
    st.integers(0, 3),
    st.integers(2, 40),
    st.integers(0, 9),
)
def test_dino(small_tiles, seed, B, num_local, K, cache_rows):
    g = torch.Generator().manual_seed(seed)
    student, teacher = unit(2 + num_local, B, 6, generator=g).requires_grad_(), unit(2, B, 6, generator=g)
    ours, theirs = torch.randn(K, 6, generator=g).requires_grad_(), torch.randn(K, 6, generator=g)
    weights = losses.crop_pair_weights(2, num_local, local_weight=0.5)
    targets = PrototypeTargets(teacher, theirs, temperature=0.07, cache_bytes=4 * K * cache_rows)
    plain_targets = losses.sinkhorn_knopp(teacher @ theirs.T, temperature=0.07)
    torch.testing.assert_close(targets.log().exp(), plain_targets.flatten(0, 1), rtol=1e-4, atol=1e-6)

    loss, pairs = prototype_dino_loss(student, ours, targets=targets, pair_weights=weights)
    plain = losses.dino_loss(student @ ours.T, plain_targets, pair_weights=weights)
    assert relative(loss, plain) < 2e-6
    for a, b in zip(
        torch.autograd.grad(3 * loss, (student, ours)), torch.autograd.grad(3 * plain, (student, ours)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    log_p = F.log_softmax(student @ ours.T / 0.1, -1)
    torch.testing.assert_close(pairs, -torch.einsum("sbk,tbk->st", log_p, plain_targets) / B, rtol=1e-5, atol=1e-5)
    assert not pairs.requires_grad


@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**31), st.integers(1, 9))
def test_ibot(small_tiles, seed, cache_rows):
    g, K = torch.Generator().manual_seed(seed), 33
    masks = torch.rand(5, 8, generator=g) > 0.6
    M = int(masks.sum())
    student, teacher = unit(M, 6, generator=g).requires_grad_(), unit(M, 6, generator=g)
    ours, theirs = torch.randn(K, 6, generator=g).requires_grad_(), torch.randn(K, 6, generator=g)
    targets = PrototypeTargets(teacher, theirs, temperature=0.07, cache_bytes=4 * K * cache_rows)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = prototype_ibot_loss(student, ours, targets=targets, masks=masks)
    plain = losses.ibot_loss(student @ ours.T, losses.sinkhorn_knopp(teacher @ theirs.T, temperature=0.07), masks=masks)
    assert relative(loss, plain) < 2e-6
    for a, b in zip(
        torch.autograd.grad(loss, (student, ours)), torch.autograd.grad(plain, (student, ours)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


class LargestTensor(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return out


@pytest.mark.parametrize("M", [300, 1200])
def test_no_tensor_grows_with_prototypes_times_tokens(M):
    g, K, d = torch.Generator().manual_seed(0), 16384, 8
    student, prototypes = unit(M, d, generator=g).requires_grad_(), torch.randn(K, d, generator=g).requires_grad_()
    with LargestTensor() as largest:
        targets = PrototypeTargets(unit(M, d, generator=g), prototypes, temperature=0.07, cache_bytes=4 * K * 50)
        mask = torch.ones(M // 10, 10, dtype=torch.bool)
        prototype_ibot_loss(student, prototypes, targets=targets, masks=mask).backward()
    assert largest.numel <= max(M * losses.CPU_TILE, K * d)


def test_equals_float64_at_a_real_size():
    """At 4,096 prototypes loss and gradients stay within 1e-6 of float64 arithmetic throughout."""
    g, K, d, M = torch.Generator().manual_seed(0), 4096, 64, 96
    masks = torch.zeros(6, 16, dtype=torch.bool) | True
    student, teacher = unit(M, d, generator=g).requires_grad_(), unit(M, d, generator=g)
    ours, theirs = (0.02 * torch.randn(K, d, generator=g)).requires_grad_(), 0.02 * torch.randn(K, d, generator=g)
    targets = PrototypeTargets(teacher, theirs, temperature=0.04, cache_bytes=4 * K * 40)
    loss = prototype_ibot_loss(student, ours, targets=targets, masks=masks)
    log_q = (teacher.double() @ theirs.double().T) / 0.04
    for _ in range(3):
        log_q = log_q - torch.logsumexp(log_q, 0)
        log_q = log_q - torch.logsumexp(log_q, 1, keepdim=True)
    plain = -(log_q.exp() * F.log_softmax(student.double() @ ours.double().T / 0.1, -1)).sum(-1).mean()
    assert relative(loss.double(), plain) < 1e-6
    for a, b in zip(
        torch.autograd.grad(loss, (student, ours)), torch.autograd.grad(plain, (student, ours)), strict=True
    ):
        assert relative(a.double(), b.double()) < 1e-6


def test_no_masked_patch_gives_zero_loss_and_gradients():
    student, prototypes = torch.empty(0, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    targets = PrototypeTargets(torch.empty(0, 4), torch.randn(9, 4), temperature=0.07)
    loss = prototype_ibot_loss(student, prototypes, targets=targets, masks=torch.zeros(3, 4, dtype=torch.bool))
    loss.backward()
    assert loss == 0
    assert not prototypes.grad.any()


def test_second_backward_is_refused_not_wrong():
    targets = PrototypeTargets(unit(4, 3, generator=None), torch.randn(5, 3), temperature=0.07)
    student = unit(4, 3, generator=None).requires_grad_()
    loss = prototype_ibot_loss(student, torch.randn(5, 3), targets=targets, masks=torch.ones(2, 2, dtype=torch.bool))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="first backward"):
        loss.backward()


def test_parts_of_the_targets_are_balanced_over_the_whole(small_tiles) -> None:
    features, prototypes = F.normalize(torch.randn(10, 6), dim=1), torch.randn(40, 6)
    whole = PrototypeTargets(features, prototypes, temperature=0.1, cache_bytes=4 * 40 * 5)
    wanted = losses.sinkhorn_knopp(features @ prototypes.T, temperature=0.1)
    for start, stop in ((0, 4), (3, 8), (8, 10)):
        part = whole.part(start, stop)
        torch.testing.assert_close(part.log().exp(), wanted[start:stop])
