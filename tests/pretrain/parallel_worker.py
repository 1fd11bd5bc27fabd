"""One process of `test_parallel.py`: shards or replicates a small network and writes what it got. Not a test itself."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn

from densedino.distributed import rank, world_size
from densedino.models.catalog import create_model
from densedino.pretrain import parallel
from densedino.pretrain.projection import ProjectionHead
from densedino.pretrain.snapshots import (
    Position,
    find_snapshot,
    read_snapshot,
    training_tensors,
    write_snapshot,
)

B = 4


def network(seed):
    torch.manual_seed(seed)
    backbone = create_model("debug_vit", device="cpu")
    backbone.init_weights()
    for block in backbone.blocks:
        nn.init.ones_(block.ls1.gamma), nn.init.ones_(block.ls2.gamma)
    head = ProjectionHead(32, hidden_dim=16, bottleneck_dim=8, num_prototypes=24)
    student = nn.Module()
    student.backbone, student.dino_head = backbone, head
    model = nn.Module()
    model.student = student
    return model


def build(seed, mode):
    model = network(seed)
    if "recompute" in mode:
        parallel.recompute_blocks(model.student.backbone, how="full" if "full" in mode else "selective")
    if "sharded" in mode:
        parallel.shard([model.student.backbone, model.student.dino_head])
    optimizer = torch.optim.AdamW(model.student.parameters(), lr=0.01, eps=1e-3, fused=True)
    return model, optimizer


def step(model, optimizer, number):
    g = torch.Generator().manual_seed(number)
    images = torch.randn(B, 3, 32, 32, generator=g)
    mine = slice(rank() * B // world_size(), (rank() + 1) * B // world_size())
    student = model.student
    features = student.dino_head(student.backbone.training_features(images[mine])[0])
    logits = features @ parallel.whole(student.dino_head.last_layer.weight).T
    loss = torch.logsumexp(logits * 10, -1).mean()
    loss.backward()
    parallel.average_gradients(model.parameters())
    optimizer.step()
    gradients = {n: whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}
    optimizer.zero_grad()
    return gradients


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()


def run(mode, folder):
    folder = Path(folder)
    model, optimizer = build(0, mode)
    gradients = step(model, optimizer, 0)
    step(model, optimizer, 1)
    state = training_tensors(model, optimizer)
    write_snapshot(folder / mode, state, position=Position(stage=0, step=2, total=2), config={})
    out = {"gradients": gradients, "state": {name: whole(value) for name, value in state.items()}}
    # Whatever others have written, in other numbers and modes, is read here.
    for other in sorted(folder.glob("from_*")):
        model, optimizer = build(1, mode)
        state = training_tensors(model, optimizer)
        read_snapshot(find_snapshot(other, announce=print), state)
        out[other.name] = {name: whole(value) for name, value in state.items()}
    return out


if __name__ == "__main__":
    with parallel.processes("cpu"):
        result = run(*sys.argv[1:])
        torch.save(result, Path(sys.argv[2]) / f"{sys.argv[1]}_{rank()}.pt")
