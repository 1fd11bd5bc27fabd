"""Owns the DINO and iBOT losses without their logits: cross-entropy over prototypes, a block of rows at a time.

Logits over K prototypes are N·K numbers, for teacher and student, and again in the backward pass. Here only the heads'
bottleneck features [N, d] and prototypes [K, d] are held, plus three blocks of `block_bytes` and a bounded cache.
Two facts make it possible. Sinkhorn-Knopp targets are softmax(scores + u) with one number u per prototype, so they can
be remade for any rows. And the loss is a scalar that is linear in what comes after it, so the gradients are computed
while a block's logits are there, in the forward pass; the backward pass scales them.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch

from densedino.pretrain.losses import full_precision, masked_token_weights, sinkhorn_bias

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch.distributed as dist
    from torch import Tensor

__all__ = ["PrototypeTargets", "prototype_dino_loss", "prototype_ibot_loss"]

BLOCK_BYTES = 64 * 2**20  # 256 rows of 65,536 prototypes
CACHE_BYTES = 512 * 2**20  # 2,048 such rows


class PrototypeTargets:
    """Sinkhorn-Knopp targets of teacher features, made on demand; equal to `sinkhorn_knopp` of their logits.

    Args:
        features: the teacher head's bottleneck features [..., d] of this process's samples (maybe none).
        prototypes: the teacher head's last weight [K, d], a plain tensor (of FSDP parameters: `.full_tensor()`).
        temperature: divides the logits.
        num_iterations: Sinkhorn-Knopp rounds, at least 1.
        group: the processes that hold the batch; None means all.
        block_bytes: size of a block of logits; at least one image's crops are taken at once. Larger blocks feed the
            matrix product better.
        cache_bytes: logits kept between the rounds; those beyond are remade in each, by one matrix product.
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
        block_bytes: int = BLOCK_BYTES,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self.features = features.detach().float().flatten(0, -2) / temperature
        self.prototypes = prototypes.detach().float()
        row_bytes = 4 * len(self.prototypes)
        self.rows_per_block = max(1, block_bytes // row_bytes)
        self._cache = self.features[: cache_bytes // row_bytes] @ self.prototypes.T
        self.bias = sinkhorn_bias(self._blocks, like=self._cache, num_iterations=num_iterations, group=group)

    def __len__(self) -> int:
        return len(self.features)

    def part(self, start: int, stop: int) -> PrototypeTargets:
        """The targets of the samples from `start` to `stop`, still balanced over all of them."""
        part = copy.copy(self)
        part.features, part._cache = self.features[start:stop], self._cache[start:stop]
        return part

    @torch.no_grad()
    def read(self, start: int, stop: int, *, bias: Tensor, out: Tensor) -> Tensor:
        """Logits over the temperature, plus `bias` [K], of the samples from `start` to `stop`, into `out`."""
        kept = self._cache[start:stop]
        torch.add(kept, bias, out=out[: len(kept)])
        if len(kept) < stop - start:
            remade = self.features[start + len(kept) : stop]
            torch.addmm(bias, remade, self.prototypes.T, out=out[len(kept) : stop - start])
        return out[: stop - start]

    def _blocks(self, bias: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        block = bias.new_empty(self.rows_per_block, len(bias))
        for start in range(0, len(self), self.rows_per_block):
            stop = min(start + self.rows_per_block, len(self))
            yield self.read(start, stop, bias=bias, out=block), bias.new_ones(stop - start)


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
        entropies = torch.zeros_like(pair_weights)
        grad_student = torch.zeros_like(student) if ctx.needs_input_grad[0] else None
        grad_prototypes = torch.zeros_like(prototypes) if ctx.needs_input_grad[1] else None
        # A student row's gradient is (p − its mean target) times what all its targets weigh; the latter scales rows
        # of d numbers instead of K.
        crop_weights = pair_weights.sum(1, keepdim=True)
        shares = pair_weights / crop_weights.clamp(min=torch.finfo(torch.float32).tiny)
        scale = (crop_weights * image_weights / temperature)[:, :, None]
        step = max(1, targets.rows_per_block // max(S, T))
        work = student.new_empty(3, min(step, B) * max(S, T), len(prototypes))
        for start in range(0, B, step):
            images = slice(start, min(start + step, B))
            n = images.stop - start
            for t in range(T):
                targets.read(t * B + start, t * B + images.stop, bias=targets.bias, out=work[0, t * n : (t + 1) * n])
            wanted = torch.softmax(work[0, : T * n], dim=-1, out=work[1, : T * n]).view(T, n, -1)
            x = student[:, images].flatten(0, 1)
            torch.mm(x / temperature, prototypes.T, out=work[0, : S * n])
            log_p = torch.log_softmax(work[0, : S * n], dim=-1, out=work[2, : S * n])
            entropies -= torch.einsum("sbk,tbk,b->st", log_p.view(S, n, -1), wanted, image_weights[images])
            if grad_student is None and grad_prototypes is None:
                continue
            log_p.exp_().view(S, -1).addmm_(shares, wanted.view(T, -1), alpha=-1)
            error, factor = log_p, scale[:, images].flatten(0, 1)
            if grad_student is not None:
                grad_student[:, images] = ((error @ prototypes) * factor).view(S, n, -1)
            if grad_prototypes is not None:
                grad_prototypes.addmm_(error.T, x * factor)
        ctx.grads = grad_student, grad_prototypes
        ctx.mark_non_differentiable(entropies)
        return (pair_weights * entropies).sum(), entropies

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError("the gradients of a prototype loss are freed by its first backward pass")
        student, prototypes = (None if g is None else g.mul_(grads[0]) for g in ctx.grads)
        ctx.grads = None
        return student, prototypes, None, None, None, None
