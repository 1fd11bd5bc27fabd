"""Owns which heads, hidden neurons and blocks of a ViT a smaller one keeps: measured on images, not by weights alone.

Removing columns of a linear map costs what a least-squares refit of the others cannot make good (Optimal Brain Surgeon,
Hassibi & Stork 1993; its greedy structured form is ZipLM's, Kurtic et al. 2023). An error in a branch is weighed by how
much it moves the final tokens: the gradients' covariance there, from random projections of the output.

Shapes: T tokens, D embed_dim, K columns: a branch's input to its last map, heads·head_dim or the hidden width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from densedino.errors import InputError
from densedino.models.counts import multiplications

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from densedino.models.catalog import ViTSpec
    from densedino.models.layers import Block
    from densedino.models.vit import VisionTransformer

__all__ = ["Branch", "Cut", "choose_cut", "last_map", "measure_branches", "removal_order"]

NEURONS = 32
"""Hidden neurons are kept in multiples of this: kernels are no faster for numbers between."""
_CLS = 16.0  # tokens that CLS counts for, beside an image's hundreds of patches


def last_map(block: Block, part: str) -> nn.Linear:
    """The linear map that a branch ends in: part "attn" or "mlp"."""
    found = block.attn.proj if part == "attn" else (block.mlp.fc2 if hasattr(block.mlp, "fc2") else block.mlp.w3)
    assert isinstance(found, nn.Linear)
    return found


@dataclass(frozen=True, eq=False)
class Branch:
    """What removing parts of one branch costs."""

    block: int
    part: str
    """"attn" or "mlp"."""
    order: Tensor
    """[K] columns, the first to go first; those of a head, or of `NEURONS` neurons, stand together."""
    errors: tuple[float, ...]
    """Mean square change of the final tokens after removing 0, 1, … groups; the last one is for the whole branch."""


@dataclass(frozen=True, eq=False)
class Cut:
    """What is kept."""

    spec: ViTSpec
    """Of the smaller model."""
    blocks: tuple[int, ...]
    """Of the larger one, in order."""
    columns: dict[tuple[int, str], Tensor]
    """Of each branch that is kept, sorted."""


def measure_branches(model: VisionTransformer, images: Sequence[Tensor], *, seed: int = 0) -> list[Branch]:
    """Run a ViT forward and back on batches [B, C, H, W], and order the parts of every branch.

    Args:
        model: in float32 and eval mode.
        images: normalised; a hundred pictures are enough.
        seed: of the random projections.
    """
    parts = [(i, part) for i in range(model.depth) for part in ("attn", "mlp")]
    inputs = {key: _Moments() for key in parts}
    gradients = {key: _Moments() for key in parts}
    generator = torch.Generator().manual_seed(seed)
    handles = list(_watch(model, inputs, gradients))
    try:
        for batch in images:
            _project_back(model, batch, generator)
    finally:
        for handle in handles:
            handle.remove()
    branches = []
    for i, part in parts:
        block, scale = model.blocks[i], (model.blocks[i].ls1 if part == "attn" else model.blocks[i].ls2).gamma.detach()
        size = model.spec.head_dim if part == "attn" else min(NEURONS, last_map(block, part).in_features)
        weight = last_map(block, part).weight.detach() * scale[:, None]
        order, errors = removal_order(
            weight, inputs[i, part].covariance(), gradients[i, part].second_moment(), size=size, whole=part == "attn"
        )
        branches.append(Branch(i, part, order, tuple(errors)))
    return branches


class _Moments:
    """Sums over tokens [..., K], for the covariance."""

    def __init__(self) -> None:
        self.count, self.first, self.second = 0, torch.zeros(()), torch.zeros(())

    def add(self, x: Tensor) -> None:
        x = x.detach().flatten(0, -2)
        self.count, self.first, self.second = (
            self.count + len(x),
            self.first + x.sum(0, dtype=torch.float64),
            self.second + (x.T @ x).double(),
        )

    def second_moment(self) -> Tensor:
        return self.second / self.count

    def covariance(self) -> Tensor:
        mean = self.first / self.count
        return self.second_moment() - mean[:, None] * mean


def _watch(
    model: VisionTransformer, inputs: dict[tuple[int, str], _Moments], gradients: dict[tuple[int, str], _Moments]
) -> Iterator[torch.utils.hooks.RemovableHandle]:
    def note_input(moments: _Moments) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, args: moments.add(args[0])

    def note_gradient(moments: _Moments) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_: nn.Module, __: tuple[Tensor, ...], out: Tensor) -> None:
            out.register_hook(moments.add)

        return hook

    for (i, part), moments in inputs.items():
        block = model.blocks[i]
        yield last_map(block, part).register_forward_pre_hook(note_input(moments))
        scale = block.ls1 if part == "attn" else block.ls2
        yield scale.register_forward_hook(note_gradient(gradients[i, part]))


def _project_back(model: VisionTransformer, batch: Tensor, generator: torch.Generator) -> None:
    """Backward of a random ±1 projection of the final tokens: its gradients' covariance is Jᵀ J (Hutchinson 1990)."""
    with torch.enable_grad():
        pixels = batch.detach().requires_grad_()
        out = model.forward_features(pixels)
        cls, patches = out["x_norm_clstoken"], out["x_norm_patchtokens"]
        assert cls is not None and patches is not None
        tokens = torch.cat([cls[:, None] * _CLS**0.5, patches], dim=1)
        signs = torch.randint(0, 2, tokens.shape, generator=generator, dtype=torch.float32) * 2 - 1
        torch.autograd.grad((tokens * signs.to(tokens.device)).sum(), pixels)


def removal_order(
    weight: Tensor, inputs: Tensor, metric: Tensor, *, size: int, whole: bool
) -> tuple[Tensor, list[float]]:
    """Greedy order in which columns of a map go, and the error after each group, the others refitted.

    Args:
        weight: [D, K].
        inputs: covariance [K, K] of what it is applied to.
        metric: [D, D] by which an error of its output is weighed.
        size: columns of a group.
        whole: groups are given, columns 0 to size − 1 and so on (heads); otherwise the least important ones form them.

    Returns:
        [K] columns, first to go first, and 1 + ⌈K / size⌉ errors, from 0 on.
    """
    K = weight.shape[1]
    W, S = weight.double().clone(), metric.double()
    damping = 1e-4 * inputs.diagonal().mean().clamp_min(1e-12)
    inverse = torch.linalg.inv(inputs.double() + damping * torch.eye(K, dtype=torch.float64, device=inputs.device))
    left = torch.arange(K, device=weight.device)
    order: list[Tensor] = []
    errors = [0.0]
    while len(left):
        if whole:
            scores = torch.stack([_loss(W, inverse, S, group) for group in torch.arange(len(left)).split(size)])
            worst = torch.arange(size) + size * int(scores.argmin())
        else:
            scores = (W * (S @ W)).sum(0) / inverse.diagonal()
            worst = scores.argsort()[: size - (-K % size if not order else 0)]
        errors.append(errors[-1] + float(_loss(W, inverse, S, worst)))
        rest = torch.ones(len(left), dtype=torch.bool)
        rest[worst] = False
        solved = torch.linalg.solve(inverse[worst][:, worst], inverse[worst])  # [g, k]
        W = (W - W[:, worst] @ solved)[:, rest]
        inverse = (inverse - inverse[:, worst] @ solved)[rest][:, rest]
        order.append(left[worst])
        left = left[rest]
    return torch.cat(order), errors


def _loss(W: Tensor, inverse: Tensor, S: Tensor, group: Tensor) -> Tensor:
    """What removing columns costs that a refit of the others does not make good."""
    part = W[:, group]
    return (torch.linalg.solve(inverse[group][:, group], part.T) * (S @ part).T).sum()


def choose_cut(spec: ViTSpec, branches: Sequence[Branch], *, keep: float, side: int, dropped: int = 0) -> Cut:
    """Remove what costs least for what it saves, until `keep` of the multiplications are left.

    Args:
        spec: of the model.
        branches: of `measure_branches`.
        keep: share of the multiplications at `side`, between 0 and 1.
        side: pixels of a square image.
        dropped: blocks that go whole, those whose branches cost least.

    Raises:
        InputError: what is left would be less than a head and `NEURONS` neurons in each block.
    """
    cost = {i: sum(b.errors[-1] for b in branches if b.block == i) for i in range(spec.depth)}
    gone = sorted(cost, key=cost.__getitem__)[:dropped]
    blocks = tuple(i for i in range(spec.depth) if i not in gone)
    left = [branch for branch in branches if branch.block in blocks]
    removed = dict.fromkeys(range(len(left)), 0)

    def shape() -> ViTSpec:
        widths = [len(branch.order) - _width(spec, branch, removed[n]) for n, branch in enumerate(left)]
        pruned = tuple((a // spec.head_dim, m) for a, m in zip(widths[::2], widths[1::2], strict=True))
        return replace(spec, name=f"{spec.name}-pruned", depth=len(blocks), pruned=pruned)

    most = keep * multiplications(spec, side=side)
    tokens = (side // spec.patch_size) ** 2 + 1 + spec.num_register_tokens
    steps = sorted(
        (step for n, branch in enumerate(left) for step in _steps(spec, n, branch, tokens)), key=lambda step: step[0]
    )
    for _, n, groups in steps:
        if multiplications(shape(), side=side) <= most:
            break
        removed[n] = max(removed[n], groups)
    found = shape()
    if multiplications(found, side=side) > most:
        raise InputError(
            f"keep {keep:g}: {spec.name} with a head and {NEURONS} hidden neurons in each of its {len(blocks)} blocks "
            f"keeps {multiplications(found, side=side) / multiplications(spec, side=side):.2f} of the multiplications."
            " Keep more."
        )
    columns = {
        (branch.block, branch.part): branch.order[_width(spec, branch, removed[n]) :].sort().values
        for n, branch in enumerate(left)
    }
    return Cut(found, blocks, columns)


def _width(spec: ViTSpec, branch: Branch, groups: int) -> int:
    """Columns that the first `groups` groups have."""
    K = len(branch.order)
    size = spec.head_dim if branch.part == "attn" else min(NEURONS, K)
    return max(0, groups * size - (-K % size)) if groups else 0


def _steps(spec: ViTSpec, n: int, branch: Branch, tokens: int) -> Iterator[tuple[float, int, int]]:
    """(error for a multiplication saved, n, groups removed up to here), along the lower convex hull of the errors."""
    most = len(branch.errors) - 2  # one group stays
    per_column = 4 * spec.embed_dim + 2 * tokens if branch.part == "attn" else spec.embed_dim * _maps(spec)
    at = 0
    while at < most:
        slopes = [(branch.errors[k] - branch.errors[at]) / (k - at) for k in range(at + 1, most + 1)]
        best = min(range(len(slopes)), key=slopes.__getitem__)
        group = _width(spec, branch, at + 1 + best) - _width(spec, branch, at)
        for k in range(at + 1, at + 2 + best):
            yield slopes[best] * (1 + best) / (group * per_column), n, k
        at += 1 + best


def _maps(spec: ViTSpec) -> int:
    return 3 if spec.ffn == "swiglu" else 2
