"""Owns the losses of the method as functions of tensors: fp32 inside, any device, no process group needed.

Shapes: `S`, `T` student and teacher crops of an image, `B` images, `N` patch tokens, `K` prototypes, `D` channels.
Under a process group each process gives its own images and gets the loss over them; the mean over processes is the
loss over the global batch (what DDP's and FSDP's gradient averaging assumes). Papers: DINO (arXiv 2104.14294), iBOT
(2111.07832), SwAV (2006.09882, Sinkhorn-Knopp), KoLeo (1806.03198), DINOv2 (2304.07193), DINOv3 (2508.10104).
The same DINO and iBOT losses without logits held whole are in `densedino.pretrain.prototypes`.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Literal, ParamSpec, TypeVar

import torch
import torch.nn.functional as F

from densedino.distributed import all_gather, all_reduce, rank
from densedino.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch.distributed as dist
    from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

__all__ = [
    "add_exp",
    "crop_pair_weights",
    "dino_loss",
    "full_precision",
    "gram_loss",
    "ibot_loss",
    "koleo_loss",
    "masked_token_weights",
    "resize_tokens",
    "sinkhorn_bias",
    "sinkhorn_knopp",
    "tiles",
]


CPU_TILE = 1024  # 1 MiB of scores with 256 samples


def full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """Make a function of tensors run outside autocast, so that fp32 inside means fp32 products too."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        device = next(x.device for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor))
        with torch.autocast(device.type, enabled=False):
            return function(*args, **kwargs)

    return run


@full_precision
@torch.no_grad()
def sinkhorn_knopp(
    logits: Tensor,
    *,
    temperature: float,
    num_iterations: int = 3,
    weights: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Teacher logits [..., K] → targets of the same shape, fp32: balanced over prototypes, each sample summing to 1.

    Each iteration gives every prototype the same mass over the global batch, then every sample the same mass over
    prototypes (SwAV §3.1 as used by DINOv2 §4). It runs on logarithms: no logit overflows or vanishes.

    Args:
        logits: scores of this process's samples; processes may hold different numbers of them, also none.
        temperature: divides the logits.
        num_iterations: rounds of the two normalisations, at least 1.
        weights: [...] mass of each sample, by default equal: 2 counts a sample twice, 0 leaves it out (it still gets
            its targets).
        group: the processes that hold the batch; None means all.
    """
    scores = logits.float().flatten(0, -2) / temperature
    counted, mass = scores, torch.ones_like(scores[:, 0])
    if weights is not None:
        present = weights.flatten() > 0
        counted, mass = scores[present], weights.flatten()[present].to(mass)
    bias = sinkhorn_bias(
        lambda prototypes: counted[:, prototypes],
        num_prototypes=scores.shape[-1],
        mass=mass,
        num_iterations=num_iterations,
        group=group,
    )
    return torch.softmax(scores + bias, dim=-1).view_as(logits)


def tiles(num_prototypes: int, device: torch.device) -> list[slice]:
    """Cut prototypes so that a CPU's cache holds the scores of some hundred samples over one piece."""
    width = CPU_TILE if device.type == "cpu" else 16 * CPU_TILE
    return [slice(start, min(start + width, num_prototypes)) for start in range(0, num_prototypes, width)]


@torch.no_grad()
def sinkhorn_bias(
    scores: Callable[[slice], Tensor],
    *,
    num_prototypes: int,
    mass: Tensor,
    num_iterations: int = 3,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """The vector u [K] for which softmax(scores + u) are the Sinkhorn-Knopp targets.

    A round ends by normalising each sample, which is a softmax; what the rounds find is one number per prototype. It
    depends on that prototype's scores alone, and the samples' sums over prototypes add up as these come; so each round
    reads the scores once, some prototypes at a time, and they may be remade instead of kept.

    Args:
        scores: of the samples over a slice of prototypes [R, k]: logits over the temperature. They are not changed.
        num_prototypes: K.
        mass: of the samples [R], positive.
        num_iterations: at least 1.
        group: the processes that hold the batch; None means all.
    """
    samples = all_reduce(mass.sum(), group=group)
    bias = mass.new_empty(num_prototypes)
    highest, total = torch.full_like(mass, -torch.inf), torch.zeros_like(mass)
    for part in tiles(num_prototypes, mass.device):
        given = scores(part)
        peak = given.amax(0) if len(given) else given.new_full(given.shape[1:], -torch.inf)
        peak = all_reduce(peak, op="max", group=group)
        bias[part] = -peak - torch.log(all_reduce(mass @ (given - peak).exp_(), group=group))
        add_exp(highest, total, given + bias[part])
    for _ in range(num_iterations - 1):
        # With the last bias each prototype held the same mass, so no sample had more than 1 and normalising samples
        # leaves each prototype at least 1/(samples·K): the logarithm below is always finite.
        rows, total = (highest + torch.log(total))[:, None], torch.zeros_like(mass)
        highest = rows[:, 0]
        for part in tiles(num_prototypes, mass.device):
            shares = (scores(part) + bias[part]).sub_(rows).exp_()
            excess = all_reduce(mass @ shares, group=group).mul_(num_prototypes / samples)
            bias[part] -= torch.log(excess)
            total += shares @ excess.reciprocal_()
    return bias


def add_exp(highest: Tensor, total: Tensor, scores: Tensor) -> None:
    """Add Σ_k exp(scores [R, k]) to sums kept as total [R] · exp(highest [R]), in place; `scores` are overwritten."""
    if not len(scores):
        return
    peak = torch.maximum(highest, scores.amax(1))
    total.mul_(torch.exp(highest - peak)).add_(scores.sub_(peak[:, None]).exp_().sum(1))
    highest.copy_(peak)


def crop_pair_weights(num_global: int, num_local: int, *, local_weight: float = 1.0) -> Tensor:
    """Weights [S = global + local, T = global] that turn per-pair cross-entropies into the DINO loss.

    A crop is not compared with itself; the other G·(G−1) + G·L pairs count equally and sum to 1 (DINO eq. 3, DINOv2's
    bookkeeping: for 2 + 8 crops 2/18 on global-global terms and 16/18 on local ones). `local_weight` multiplies the
    local terms, without renormalising.

    Raises:
        InputError: there is no pair of different crops.
    """
    pairs = num_global * (num_global - 1 + num_local)
    if pairs < 1:
        raise InputError(
            f"the DINO loss compares different crops of an image; got {num_global} global and {num_local} local ones."
            " Use at least two crops, one of them global."
        )
    weights = torch.full((num_global + num_local, num_global), 1.0 / pairs)
    weights[:num_global].fill_diagonal_(0)
    weights[num_global:] *= local_weight
    return weights


@full_precision
def dino_loss(
    student_logits: Tensor, targets: Tensor, *, pair_weights: Tensor | None = None, temperature: float = 0.1
) -> Tensor:
    """Cross-entropy of student logits [S, B, K] against targets [T, B, K] (probabilities), mean over images.

    Args:
        student_logits: one row per student crop and image.
        targets: from `sinkhorn_knopp`, of the same images.
        pair_weights: [S, T], usually from `crop_pair_weights`; by default the mean over all S·T pairs.
        temperature: the student's.
    """
    S, B, _ = student_logits.shape
    T = len(targets)
    if pair_weights is None:
        pair_weights = student_logits.new_full((S, T), 1 / (S * T), dtype=torch.float32)
    log_p = F.log_softmax(student_logits.float() / temperature, dim=-1)
    pairs = -torch.einsum("sbk,tbk->st", log_p, targets.float())
    return (pairs * pair_weights.to(pairs)).sum() / B


@full_precision
def ibot_loss(student_logits: Tensor, targets: Tensor, *, masks: Tensor, temperature: float = 0.1) -> Tensor:
    """Cross-entropy at the masked patches: mean over an image's masked patches, then over all images (iBOT eq. 2).

    Images without a masked patch count as zero.

    Args:
        student_logits: [M, K] at the M masked patches, in the order of `masks.flatten()`.
        targets: [M, K] probabilities from `sinkhorn_knopp`.
        masks: [B, N] bool, True where the student's patch was masked.
        temperature: the student's.
    """
    log_p = F.log_softmax(student_logits.float() / temperature, dim=-1)
    return -((log_p * targets.float()).sum(-1) * masked_token_weights(masks)).sum()


def masked_token_weights(masks: Tensor) -> Tensor:
    """The iBOT weight of each masked patch of masks [B, N] → [M] fp32: 1 / (masked patches in its image · B)."""
    per_image = 1 / masks.sum(1, keepdim=True).clamp(min=1).float()
    return (per_image / len(masks)).expand_as(masks)[masks]


@full_precision
def koleo_loss(
    features: Tensor,
    *,
    topk: int = 1,
    group_size: int | None = None,
    distributed: bool = False,
    group: dist.ProcessGroup | None = None,
    eps: float = 1e-8,
) -> Tensor:
    """Spreads features [B, D] over the sphere: −mean log(distance to the nearest other sample + eps) (1806.03198 §3).

    Distances are between L2-normalised rows. A sample with no other in its group adds nothing, rather than being its
    own neighbour.

    Args:
        features: this process's samples, one crop of each image (the method sums the loss over the global crops).
        topk: mean over this many nearest neighbours.
        group_size: neighbours are sought among this many consecutive samples (DINOv3 §3.1 uses 16); None: among all.
        distributed: samples are those of all processes in rank order, so that groups may span processes and do not
            depend on how many there are; otherwise this process's own. Processes must hold equally many.
        group: the processes that hold the batch; None means all.
        eps: added to the distance.

    Raises:
        InputError: the samples do not divide into groups of `group_size`.
    """
    own = F.normalize(features.float(), dim=-1, eps=eps)
    everyone = all_gather(own, group=group) if distributed else own
    size = len(everyone) if group_size is None else group_size
    if size < 1 or len(everyone) % size:
        raise InputError(
            f"KoLeo groups of {group_size} samples do not divide the {len(everyone)} samples that are there."
            " Give a group_size that divides them, or None."
        )
    start = rank(group) * len(own) if distributed else 0
    index = torch.arange(start, start + len(own), device=own.device)
    neighbours = min(topk, size - 1)
    if neighbours < 1:
        return own.sum() * 0
    with torch.no_grad():  # which ones are nearest; how far they are is computed below from differences, exactly
        # From coordinates about each group's centre: a fresh network's features differ in their last digits only, of
        # which products of the features themselves would keep none.
        groups = everyone.unflatten(0, (-1, size))
        centred = (groups - groups.mean(1, keepdim=True)).flatten(0, 1)
        closeness = 2 * centred[index] @ centred.T - centred.square().sum(-1)
        others = torch.arange(len(everyone), device=own.device)
        outside = (index[:, None] // size) != (others // size)
        closeness.masked_fill_(outside | (index[:, None] == others), -torch.inf)
        nearest = closeness.topk(neighbours, dim=1).indices
    distance = torch.linalg.vector_norm(own[:, None] - everyone[nearest], dim=-1)
    return -torch.log(distance + eps).mean()


@full_precision
def gram_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    normalized: bool = True,
    img_level: bool = True,
    remove_neg: bool = False,
    remove_only_teacher_neg: bool = False,
    tokens_used: Literal["all", "masked", "unmasked"] = "all",
    masks: Tensor | None = None,
) -> Tensor:
    """Mean squared difference of patch-patch similarity matrices (Gram anchoring, DINOv3 §4.2), diagonal included.

    Args:
        student: patch tokens [B, N, D] of the global crops as the student saw them (masked), after the final norm.
        teacher: those of the Gram teacher, on the same grid (see `resize_tokens`). Gets no gradient.
        normalized: L2-normalise each token first: cosine similarities.
        img_level: one N×N matrix per image; otherwise one over all tokens of this process's batch.
        remove_neg: replace negative similarities by 0, on both sides.
        remove_only_teacher_neg: replace the teacher's negative similarities by 0, and the student's where both are
            negative: the student is pulled up to 0 nowhere, and down to 0 where the teacher is negative.
        tokens_used: restrict to the masked or the unmasked tokens; needs `masks` and `img_level=False`.
        masks: [B, N] bool, True where the student's patch was masked.

    Raises:
        InputError: options that contradict each other.
    """
    if remove_neg and remove_only_teacher_neg:
        raise InputError("remove_neg and remove_only_teacher_neg exclude each other; set one of them to False.")
    if tokens_used != "all":
        if img_level or masks is None:
            raise InputError(
                f"tokens_used={tokens_used!r} leaves each image another number of tokens: it needs img_level=False"
                f" and masks [B, N]; got img_level={img_level} and {'no masks' if masks is None else 'masks'}."
            )
        used = masks if tokens_used == "masked" else ~masks
        student, teacher = student[used], teacher[used]
    if not img_level:
        student, teacher = student.reshape(1, -1, student.shape[-1]), teacher.reshape(1, -1, teacher.shape[-1])
    with torch.no_grad():
        target = _similarities(teacher, normalized=normalized)
    ours = _similarities(student, normalized=normalized)
    if remove_neg:
        ours, target = ours.clamp(min=0), target.clamp(min=0)
    elif remove_only_teacher_neg:
        ours, target = ours.masked_fill((ours < 0) & (target < 0), 0), target.clamp(min=0)
    return F.mse_loss(ours, target) if ours.numel() else ours.sum()


def resize_tokens(tokens: Tensor, *, grid: tuple[int, int], to: tuple[int, int]) -> Tensor:
    """Patch tokens [B, h·w, D] on `grid` (h, w) → [B, h'·w', D] on the grid `to`, bicubic, without antialiasing.

    What brings a Gram teacher that saw larger crops onto the student's grid (DINOv3 §4.3).
    """
    if grid == to:
        return tokens
    image = tokens.float().unflatten(1, grid).permute(0, 3, 1, 2)
    return F.interpolate(image, size=to, mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)


def _similarities(tokens: Tensor, *, normalized: bool) -> Tensor:
    x = F.normalize(tokens.float(), dim=-1) if normalized else tokens.float()
    return x @ x.transpose(-1, -2)
