"""Owns the DINO and iBOT losses without their logits: cross-entropy over prototypes, some prototypes at a time.

Logits over K prototypes are N·K numbers, for teacher and student, and again in the backward pass. Here only the heads'
bottleneck features [N, d] and prototypes [K, d] are held, and for the samples one number each: what normalises them.
The logits over some prototypes are remade from these, used while the cache has them, and forgotten. The loss is a
scalar that is linear in what comes after it, so gradients too are computed while the logits are there, in the forward
pass; the backward pass scales them.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch

from densedino.models.kernels import product
from densedino.pretrain.losses import add_exp, full_precision, masked_token_weights, sinkhorn_bias, tiles

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch.distributed as dist
    from torch import Tensor

__all__ = ["PrototypeTargets", "prototype_dino_loss", "prototype_ibot_loss"]

CACHE_BYTES = 512 * 2**20  # 2,048 samples' logits over 65,536 prototypes


class PrototypeTargets:
    """Sinkhorn-Knopp targets of teacher features, made on demand; equal to `sinkhorn_knopp` of their logits.

    Args:
        features: the teacher head's bottleneck features [..., d] of this process's samples (maybe none).
        prototypes: the teacher head's last weight [K, d], a plain tensor (of FSDP parameters: `.full_tensor()`).
        temperature: divides the logits.
        num_iterations: Sinkhorn-Knopp rounds, at least 1.
        group: the processes that hold the batch; None means all.
        cache_bytes: logits kept between the rounds, and only then; those beyond are remade in each.

    Attributes:
        bias: u [K], of the prototypes: softmax(logits / temperature + u) are the targets.
    """

    @full_precision
    @torch.no_grad()
    def __init__(
        self,
        features: Tensor,
        prototypes: Tensor,
        *,
        temperature: float,
        num_iterations: int = 3,
        group: dist.ProcessGroup | None = None,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self.features = features.detach().float().flatten(0, -2) / temperature
        self.prototypes = prototypes.detach().float()
        K = len(self.prototypes)
        room = cache_bytes // (4 * max(1, len(self)))
        kept = {
            part.start: product(self.features, self.prototypes[part])
            for part in tiles(K, features.device)
            if part.stop <= room
        }

        def scores(part: slice) -> Tensor:
            found = kept.get(part.start)
            return product(self.features, self.prototypes[part]) if found is None else found

        self.bias = sinkhorn_bias(
            scores,
            num_prototypes=K,
            mass=self.features.new_ones(len(self)),
            num_iterations=num_iterations,
            group=group,
        )
        self._sums = _sums(self.features, (scores(part) + self.bias[part] for part in tiles(K, features.device)))

    def __len__(self) -> int:
        return len(self.features)

    def part(self, start: int, stop: int) -> PrototypeTargets:
        """The targets of the samples from `start` to `stop`, still balanced over all of them."""
        part = copy.copy(self)
        part.features = self.features[start:stop]
        part._sums = self._sums[0][start:stop], self._sums[1][start:stop]
        return part

    @torch.no_grad()
    def log(self, prototypes: slice = slice(None)) -> Tensor:
        """The targets' logarithms, of all samples over a slice of the prototypes: a new tensor [R, k]."""
        logits = product(self.features, self.prototypes[prototypes])
        return _log_softmax(logits.add_(self.bias[prototypes]), self._sums)


@full_precision
def prototype_dino_loss(
    student: Tensor,
    prototypes: Tensor,
    *,
    targets: PrototypeTargets,
    pair_weights: Tensor,
    temperature: float = 0.1,
) -> tuple[Tensor, Tensor]:
    """`dino_loss` from bottleneck features, without logits.

    Args:
        student: bottleneck features [S, B, d] of the S student crops of B images.
        prototypes: the student head's last weight [K, d], a plain tensor.
        targets: of the teacher's features [T, B, d].
        pair_weights: [S, T], from `crop_pair_weights`.
        temperature: the student's.

    Returns:
        The loss; and the mean cross-entropy of each pair [S, T], without gradient, for the report.
    """
    image_weights = student.new_full(student.shape[1:2], 1 / student.shape[1], dtype=torch.float32)
    pairs = pair_weights.to(image_weights)
    loss, entropies = _PrototypeLoss.apply(
        student.float(), prototypes.float(), targets, pairs, image_weights, temperature
    )
    return loss, entropies


@full_precision
def prototype_ibot_loss(
    student: Tensor, prototypes: Tensor, *, targets: PrototypeTargets, masks: Tensor, temperature: float = 0.1
) -> Tensor:
    """`ibot_loss` from bottleneck features, without logits.

    Args:
        student: bottleneck features [M, d] at the M masked patches, in the order of `masks.flatten()`.
        prototypes: the student head's last weight [K, d], a plain tensor.
        targets: of the teacher's features [M, d].
        masks: [B, N] bool, True where the student's patch was masked.
        temperature: the student's.
    """
    weights = masked_token_weights(masks)
    loss: Tensor = _PrototypeLoss.apply(
        student.float()[None], prototypes.float(), targets, weights.new_ones(1, 1), weights, temperature
    )[0]
    return loss


class _PrototypeLoss(torch.autograd.Function):
    """Σ_b w_b Σ_st a_st CE(target of t, student s), of student [S, B, d], targets [T·B] rows, a [S, T], w [B]."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        prototypes: Tensor,
        targets: PrototypeTargets,
        pair_weights: Tensor,
        image_weights: Tensor,
        temperature: float,
    ) -> tuple[Tensor, Tensor]:
        (S, B, _), (T,) = student.shape, pair_weights.shape[1:]
        parts, x = tiles(len(prototypes), prototypes.device), student.flatten(0, 1) / temperature
        sums = _sums(x, (product(x, prototypes[part]) for part in parts))
        entropies = torch.zeros_like(pair_weights)
        grad_student = torch.zeros_like(x) if ctx.needs_input_grad[0] else None
        grad_prototypes = torch.empty_like(prototypes) if ctx.needs_input_grad[1] else None
        # A student row's gradient is (p − its mean target) times what all its targets weigh; the latter scales rows
        # of d numbers instead of K.
        crop_weights = pair_weights.sum(1, keepdim=True)
        shares = pair_weights / crop_weights.clamp(min=torch.finfo(torch.float32).tiny)
        factor = (crop_weights * image_weights).view(-1, 1)
        weighted = (x * factor).t()
        for part in parts:
            wanted = targets.log(part).exp_().unflatten(0, (T, B))
            log_p = _log_softmax(product(x, prototypes[part]), sums).unflatten(0, (S, B))
            entropies -= _pair_sums(log_p, wanted, image_weights)
            if grad_student is None and grad_prototypes is None:
                continue
            error = log_p.exp_().flatten(1).addmm_(shares, wanted.flatten(1), alpha=-1).view_as(log_p).flatten(0, 1)
            if grad_student is not None:
                grad_student += product(error, prototypes[part].t())
            if grad_prototypes is not None:
                grad_prototypes[part] = product(error.t(), weighted)
        if grad_student is not None:
            grad_student = grad_student.mul_(factor / temperature).view_as(student)
        ctx.grads = grad_student, grad_prototypes
        ctx.mark_non_differentiable(entropies)
        return (pair_weights * entropies).sum(), entropies

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError("the gradients of a prototype loss are freed by its first backward pass")
        once = grads[0].device.type == "cpu" and grads[0] == 1  # the usual case costs nothing
        student, prototypes = (g if g is None or once else g.mul_(grads[0]) for g in ctx.grads)
        ctx.grads = None
        return student, prototypes, None, None, None, None


def _sums(x: Tensor, logits: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """What normalises each sample of x [R, d] over all prototypes, from their logits in pieces: log Σ exp is the sum.

    The two are the largest logit and what the others add; kept apart, a large logit does not round away small ones.
    """
    highest, total = x.new_full((len(x),), -torch.inf), x.new_zeros(len(x))
    for piece in logits:
        add_exp(highest, total, piece)
    return highest[:, None], torch.log(total)[:, None]


def _log_softmax(logits: Tensor, sums: tuple[Tensor, Tensor]) -> Tensor:
    """Logits [R, k] normalised by `_sums`, in place."""
    return logits.sub_(sums[0]).sub_(sums[1])


def _pair_sums(log_p: Tensor, wanted: Tensor, weights: Tensor) -> Tensor:
    """Σ_b w_b Σ_k log_p · wanted of [S, B, k], [T, B, k] and weights [B] → [S, T]."""
    sums = [[torch.linalg.vecdot(crop, target) @ weights for target in wanted] for crop in log_p]
    return torch.stack([torch.stack(row) for row in sums])
