"""The losses against plain float64 versions written from the papers' formulas, loss and gradient."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from densedino.errors import InputError
from densedino.pretrain import losses

seeds = st.integers(0, 2**31)


def rand(*shape, seed, scale=1.0, grad=False):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale
    return x.requires_grad_(grad)


def plain_sinkhorn(logits, tau, rounds=3, weights=None):
    """As in SwAV: exponentiate, then normalise prototypes and samples in turn. float64, shifted so exp is finite."""
    z = logits.double() / tau
    mass = torch.ones(len(z), dtype=torch.double) if weights is None else weights.double()
    log_q = z + mass.log()[:, None]
    for _ in range(rounds):
        log_q = log_q - torch.logsumexp(log_q, 0, keepdim=True) - math.log(z.shape[1])
        log_q = log_q - torch.logsumexp(log_q, 1, keepdim=True) + (mass / mass.sum()).log()[:, None]
    return (log_q - (mass / mass.sum()).log()[:, None]).exp()


def plain_cross_entropy(student_logits, target, tau):
    p = torch.softmax(student_logits.double() / tau, -1)
    return -(target.double() * p.log()).sum(-1)


def close(ours, plain, rel=1e-6):
    error = (ours.double() - plain).norm() / plain.norm().clamp(min=1e-30)
    assert error <= rel, f"relative error {error:.2e}"


def same_gradient(ours, plain, *inputs, rel=1e-6):
    close(ours.detach(), plain.detach(), rel)
    for a, b in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(plain, inputs), strict=True):
        close(a, b.double(), rel)


@settings(deadline=None, max_examples=30)
@given(seeds, st.integers(1, 40), st.integers(1, 50), st.sampled_from([0.1, 1.0, 5.0]), st.integers(1, 5))
def test_sinkhorn_equals_the_plain_version(seed, B, K, scale, rounds):
    logits = rand(B, K, seed=seed, scale=scale)
    ours = losses.sinkhorn_knopp(logits, temperature=0.07, num_iterations=rounds)
    plain = plain_sinkhorn(logits, 0.07, rounds)
    # A logit over its temperature carries a rounding of 6e-8 of its size: that is what fp32 logits can say.
    size = (logits.abs().max() / 0.07).item()
    assert (ours.double() - plain).abs().max() <= 1e-6 + 4e-7 * size


@settings(deadline=None, max_examples=20)
@given(seeds, st.integers(2, 12), st.lists(st.integers(0, 3), min_size=2, max_size=12).filter(sum))
def test_a_weight_counts_a_sample_that_often(seed, K, counts):
    logits = rand(len(counts), K, seed=seed)
    counts = torch.tensor(counts)
    ours = losses.sinkhorn_knopp(logits, temperature=0.5, weights=counts)
    repeated = losses.sinkhorn_knopp(logits.repeat_interleave(counts, 0), temperature=0.5)
    torch.testing.assert_close(ours.repeat_interleave(counts, 0), repeated, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("shift", [0.0, 1e3, -1e3])
def test_sinkhorn_is_finite_and_normalised_at_any_logit(shift):
    logits = rand(64, 128, seed=0, scale=300.0) + shift  # the usual exp(logit / 0.04) overflows from 3.6 on
    logits[0] -= 5000  # and one sample far below the others
    targets = losses.sinkhorn_knopp(logits, temperature=0.04)
    assert targets.isfinite().all()
    torch.testing.assert_close(targets.sum(-1), torch.ones(64))


def test_sinkhorn_balances_the_prototypes():
    targets = losses.sinkhorn_knopp(rand(64, 16, seed=1), temperature=0.5, num_iterations=50)
    torch.testing.assert_close(targets.sum(0), torch.full((16,), 4.0), rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_losses_compute_in_fp32_whatever_comes_in(dtype):
    x, y = rand(8, 32, seed=0).to(dtype), rand(8, 32, seed=1).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert losses.sinkhorn_knopp(x, temperature=0.04).dtype == torch.float32
        close(losses.koleo_loss(x), losses.koleo_loss(x.double()).double())
        close(losses.gram_loss(x[None], y[None]), losses.gram_loss(x[None].float(), y[None].float()).double())
    assert losses.koleo_loss(x.new_zeros(4, 8)).isfinite()


@settings(deadline=None, max_examples=20)
@given(seeds, st.integers(0, 3), st.integers(1, 5), st.integers(2, 30), st.sampled_from([0.0, 0.5, 1.0]))
def test_dino_loss(seed, num_local, B, K, local_weight):
    S = 2 + num_local
    student, teacher = rand(S, B, K, seed=seed, grad=True), rand(2, B, K, seed=seed + 1)
    target = losses.sinkhorn_knopp(teacher, temperature=0.07)
    weights = losses.crop_pair_weights(2, num_local, local_weight=local_weight)
    ours = losses.dino_loss(student, target, pair_weights=weights)
    terms = {
        (s, t): plain_cross_entropy(student[s], target[t], 0.1).mean() for s in range(S) for t in range(2) if s != t
    }
    plain = sum(term * (1 if s < 2 else local_weight) for (s, _), term in terms.items()) / len(terms)
    close(ours.detach(), plain.detach())
    ours, plain = (torch.autograd.grad(loss, student)[0].double() for loss in (ours, plain))
    assert (ours - plain).norm() <= 1e-6 * plain.norm() + 1e-7 / math.sqrt(B)  # p − q cancels where they agree


def test_crop_pair_weights_are_the_published_bookkeeping():
    weights = losses.crop_pair_weights(2, 8)
    assert weights[:2].sum().item() == pytest.approx(2 / 18)
    assert weights[2:].sum().item() == pytest.approx(16 / 18)
    assert weights[0, 0] == weights[1, 1] == 0
    with pytest.raises(InputError, match="at least two crops"):
        losses.crop_pair_weights(1, 0)


def test_dino_loss_without_weights_is_the_mean_over_all_pairs():
    student, target = rand(3, 4, 8, seed=0), torch.softmax(rand(2, 4, 8, seed=1), -1)
    close(losses.dino_loss(student, target), plain_cross_entropy(student[:, None], target[None], 0.1).mean())


@settings(deadline=None, max_examples=20)
@given(seeds, st.integers(1, 5), st.integers(1, 9), st.integers(2, 30))
def test_ibot_loss(seed, B, N, K):
    masks = rand(B, N, seed=seed) > 0
    M = int(masks.sum())
    student, target = rand(M, K, seed=seed + 1, grad=True), torch.softmax(rand(M, K, seed=seed + 2), -1)
    ours = losses.ibot_loss(student, target, masks=masks)
    plain, at = torch.zeros((), dtype=torch.double), 0
    for n in masks.sum(1).tolist():
        if n:
            plain = plain + plain_cross_entropy(student[at : at + n], target[at : at + n], 0.1).mean() / B
        at += n
    if M:
        same_gradient(ours, plain, student)
    else:
        assert ours == 0


@settings(deadline=None, max_examples=20)
@given(seeds, st.integers(2, 9), st.integers(1, 3), st.sampled_from([1, 2, 3]))
def test_koleo_loss(seed, size, groups, topk):
    x = rand(size * groups, 16, seed=seed, grad=True)
    ours = losses.koleo_loss(x, topk=topk, group_size=size)
    y = x.double() / x.double().norm(dim=1, keepdim=True)
    terms = []
    for i in range(len(y)):
        first = i // size * size
        distances = torch.stack([(y[i] - y[j]).norm() for j in range(first, first + size) if j != i])
        terms += [-torch.log(d + 1e-8) for d in distances.sort().values[:topk]]
    # Logarithms of distances around 1 cancel: the loss is right to 1e-6 of their size, not of their sum's.
    assert abs(ours.item() - torch.stack(terms).mean().item()) <= 1e-6 * max(1, torch.stack(terms).abs().mean().item())
    gradients = [torch.autograd.grad(loss, x)[0] for loss in (ours, torch.stack(terms).mean())]
    close(gradients[0], gradients[1].double(), rel=3e-6)


def test_koleo_survives_a_lone_sample_and_duplicates():
    lone = rand(1, 8, seed=0, grad=True)
    assert losses.koleo_loss(lone) == 0
    twins = rand(1, 8, seed=0).expand(2, 8).clone().requires_grad_()
    loss = losses.koleo_loss(twins)
    assert loss.isfinite()
    assert torch.autograd.grad(loss, twins)[0].isfinite().all()
    with pytest.raises(InputError, match="do not divide the 5 samples"):
        losses.koleo_loss(rand(5, 8, seed=0), group_size=2)


GRAM_OPTIONS = [
    {},
    {"normalized": False},
    {"img_level": False},
    {"remove_neg": True},
    {"remove_only_teacher_neg": True},
    {"img_level": False, "tokens_used": "masked", "remove_only_teacher_neg": True},
    {"img_level": False, "tokens_used": "unmasked", "normalized": False, "remove_neg": True},
]


@pytest.mark.parametrize("options", GRAM_OPTIONS, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_gram_loss(options, seed):
    student, teacher = rand(3, 7, 5, seed=seed, grad=True), rand(3, 7, 5, seed=seed + 10)
    masks = rand(3, 7, seed=seed + 20) > 0
    ours = losses.gram_loss(student, teacher, masks=masks, **options)
    used = {"all": masks | ~masks, "masked": masks, "unmasked": ~masks}[options.get("tokens_used", "all")]
    if options.get("img_level", True):
        sets = list(zip(student.double(), teacher.double(), strict=True))
    else:
        sets = [(student[used].double(), teacher[used].double())]
    squares = []
    for s, t in sets:
        for i in range(len(s)):
            for j in range(len(s)):
                a, b = s[i] @ s[j], t[i] @ t[j]
                if options.get("normalized", True):
                    a, b = a / s[i].norm() / s[j].norm(), b / t[i].norm() / t[j].norm()
                if options.get("remove_neg"):
                    a, b = a.clamp(min=0), b.clamp(min=0)
                elif options.get("remove_only_teacher_neg") and b < 0:
                    a, b = a.clamp(min=0), torch.zeros_like(b)
                squares.append((a - b) ** 2)
    same_gradient(ours, torch.stack(squares).mean(), student)


def test_gram_loss_of_equal_geometry_is_zero():
    x = rand(2, 9, 6, seed=0)
    rotation = torch.linalg.qr(rand(6, 6, seed=1))[0]
    assert losses.gram_loss(x @ rotation, 3 * x) < 1e-12
    assert losses.gram_loss(x[:, :0], x[:, :0]) == 0


def test_gram_loss_names_contradicting_options():
    x = rand(2, 4, 3, seed=0)
    with pytest.raises(InputError, match="exclude each other"):
        losses.gram_loss(x, x, remove_neg=True, remove_only_teacher_neg=True)
    with pytest.raises(InputError, match="needs img_level=False and masks"):
        losses.gram_loss(x, x, tokens_used="masked")


def test_resize_tokens_keeps_a_plane_and_the_same_grid():
    rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(12.0), indexing="ij")
    tokens = torch.stack([rows.flatten(), columns.flatten()], -1)[None]
    assert losses.resize_tokens(tokens, grid=(8, 12), to=(8, 12)) is tokens
    half = losses.resize_tokens(tokens, grid=(8, 12), to=(4, 6)).view(4, 6, 2)
    torch.testing.assert_close(half[1:-1, 1:-1, 0], (rows[::2, ::2] + 0.5)[1:-1, 1:-1])
    torch.testing.assert_close(half[1:-1, 1:-1, 1], (columns[::2, ::2] + 0.5)[1:-1, 1:-1])
