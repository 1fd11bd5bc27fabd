"""One process of `test_distributed.py`: computes this rank's share and writes it to a file. Not a test itself."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F

from densedino import distributed
from densedino.pretrain import losses
from densedino.pretrain.prototypes import PrototypeTargets, prototype_dino_loss, prototype_ibot_loss

B, N, K, D = 6, 10, 24, 5  # images in the global batch, patches, prototypes, channels


def inputs():
    g = torch.Generator().manual_seed(0)
    masks = torch.rand(B, N, generator=g) > 0.6
    masks[B // 2 :] &= torch.rand(B // 2, 1, generator=g) > 0.5
    masks[-2:] = False  # with three processes, one has no masked patch
    return {
        "student": F.normalize(torch.randn(4, B, D, generator=g), dim=-1),
        "teacher": F.normalize(torch.randn(2, B, D, generator=g), dim=-1),
        "student_patches": F.normalize(torch.randn(B, N, D, generator=g), dim=-1),
        "teacher_patches": F.normalize(torch.randn(B, N, D, generator=g), dim=-1),
        "masks": masks,
        "prototypes": torch.randn(K, D, generator=g).requires_grad_(),
        "teacher_prototypes": torch.randn(K, D, generator=g),
    }


def share(rank: int, world: int):
    """The losses over this rank's images, and the gradients by mean over ranks (what DDP does)."""
    given, n = inputs(), B // world
    mine = slice(rank * n, (rank + 1) * n)
    student, teacher = given["student"][:, mine].clone().requires_grad_(), given["teacher"][:, mine]
    patches, theirs = given["student_patches"][mine].clone().requires_grad_(), given["teacher_patches"][mine]
    masks, weights, frozen = given["masks"][mine], given["prototypes"], given["teacher_prototypes"]
    pairs = losses.crop_pair_weights(2, 2)

    losses.CPU_TILE = 3  # several pieces
    plain_targets = losses.sinkhorn_knopp(teacher @ frozen.T, temperature=0.07)
    targets = PrototypeTargets(teacher, frozen, temperature=0.07, cache_bytes=4 * K)
    patch_targets = PrototypeTargets(theirs[masks], frozen, temperature=0.07)
    plain_patch_targets = losses.sinkhorn_knopp(theirs[masks] @ frozen.T, temperature=0.07)
    results = {
        "dino": losses.dino_loss(student @ weights.T, plain_targets, pair_weights=pairs),
        "dino_blocks": prototype_dino_loss(student, weights, targets=targets, pair_weights=pairs)[0],
        "ibot": losses.ibot_loss(patches[masks] @ weights.T, plain_patch_targets, masks=masks),
        "ibot_blocks": prototype_ibot_loss(patches[masks], weights, targets=patch_targets, masks=masks),
        "koleo": losses.koleo_loss(student[0], distributed=True),
        "koleo_groups": losses.koleo_loss(student[0], distributed=True, group_size=3, topk=2),
    }
    out = {}
    for name, loss in results.items():
        student.grad = patches.grad = weights.grad = None
        loss.backward()
        blank = torch.zeros_like(given["student"][0, :, 0])  # gradients with respect to every image, in its own place
        grads = torch.stack([blank.clone(), blank.clone()])
        for row, x in enumerate((student, patches)):
            if x.grad is not None:
                per_image = (x.grad**2).sum((0, 2) if row == 0 else (1, 2))
                grads[row, mine] = per_image / world**2
        prototypes = torch.zeros(K, D) if weights.grad is None else weights.grad / world
        total = distributed.all_reduce(loss.detach() / world)
        out[name] = (total, distributed.all_reduce(grads), distributed.all_reduce(prototypes.clone()))
    return out


def main(rank: int, world: int, folder: str) -> None:
    assert distributed.rank() == 0
    assert distributed.world_size() == 1
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    assert distributed.rank() == rank
    assert distributed.world_size() == world
    x = torch.arange(4.0).view(2, 2).T + 10 * rank  # not contiguous
    x.requires_grad_()
    gathered = distributed.all_gather(x)
    (gathered * (rank + 1)).sum().backward()
    peak = distributed.all_reduce(torch.tensor([float(rank)]), op="max")
    out = {"losses": share(rank, world), "gathered": gathered.detach(), "gather_grad": x.grad, "peak": peak}
    torch.save(out, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
