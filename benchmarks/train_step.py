"""Prints time and peak memory of one training step, ours ÷ a plain implementation of the same step, side by side.

    python benchmarks/train_step.py                                   batches of 4 and 8 images, fp32 and bf16
    python benchmarks/train_step.py --batches 8 --precisions fp32 --drop-path 0.3 --rounds 3 --prototypes 262144

ViT-S/16, 2 crops of 224 and 8 of 96 pixels, heads of 3 layers (2048, 256), Sinkhorn-Knopp targets, masks on half of
the global crops, KoLeo, clipping by module, AdamW, EMA teacher. "plain" is the usual way, written here without the
package's models and losses: `nn.Linear`, `scaled_dot_product_attention`, rotate-half RoPE, one forward pass per
resolution, stochastic depth on the kept samples only, logits over prototypes held whole, Sinkhorn-Knopp on their
exponentials, autograd, fused AdamW, foreach EMA, bf16 by autocast. Each measurement is a process of its own; the
versions take turns. Time is the median of a process' steps after the first two, then the best over processes. Memory
is the peak resident size minus that after importing torch (Linux): weights, optimizer and activations. `--cpu-time`
runs one thread and takes its own time, which other work beside it disturbs less.
"""

# ruff: noqa: D101, D102 (the plain version's parts are what their names say)

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable

DIM, DEPTH, HEADS, HIDDEN = 384, 12, 6, 1536
LR, WEIGHT_DECAY, MOMENTUM, CLIP, TEACHER_TEMPERATURE = 1e-3, 0.04, 0.994, 3.0, 0.07


def rotate_half(x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat([-b, a], dim=-1)


class PlainBlock(nn.Module):
    def __init__(self, drop_path: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(DIM, eps=1e-5), nn.LayerNorm(DIM, eps=1e-5)
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.fc1, self.fc2 = nn.Linear(DIM, HIDDEN), nn.Linear(HIDDEN, DIM)
        self.gamma1, self.gamma2 = nn.Parameter(torch.full((DIM,), 1e-5)), nn.Parameter(torch.full((DIM,), 1e-5))
        self.drop_path = drop_path

    def attend(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        B, N, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(B, N, 3, HEADS, DIM // HEADS).permute(2, 0, 3, 1, 4)
        sin, cos = rope
        prefix = N - len(sin)

        def rope_of(t: Tensor) -> Tensor:
            rotated = t[:, :, prefix:] * cos + rotate_half(t[:, :, prefix:]) * sin
            return torch.cat([t[:, :, :prefix], rotated.to(t.dtype)], dim=2)

        out = F.scaled_dot_product_attention(rope_of(q), rope_of(k), v)
        return self.proj(out.transpose(1, 2).reshape(B, N, DIM)) * self.gamma1

    def feed(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(self.norm2(x)))) * self.gamma2

    def add(self, x: Tensor, branch: Callable[[Tensor], Tensor]) -> Tensor:
        if not self.training or not self.drop_path:
            return x + branch(x)
        kept = torch.randperm(len(x))[: max(1, round(len(x) * (1 - self.drop_path)))]
        return x.index_add(0, kept, branch(x[kept]).to(x.dtype), alpha=len(x) / len(kept))

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        x = self.add(x, lambda kept: self.attend(kept, rope))
        return self.add(x, self.feed)


class PlainViT(nn.Module):
    def __init__(self, drop_path: float) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, DIM, 16, 16)
        self.prefix = nn.Parameter(torch.randn(1, 5, DIM) * 0.02)
        self.mask_token = nn.Parameter(torch.zeros(DIM))
        self.blocks = nn.ModuleList(PlainBlock(drop_path) for _ in range(DEPTH))
        self.norm = nn.LayerNorm(DIM, eps=1e-5)

    def rope(self, h: int, w: int) -> tuple[Tensor, Tensor]:
        periods = 100.0 ** (torch.arange(16) / 16)
        y, x = torch.meshgrid((torch.arange(h) + 0.5) / h * 2 - 1, (torch.arange(w) + 0.5) / w * 2 - 1, indexing="ij")
        angles = (2 * math.pi * torch.stack([y, x], -1)[..., None] / periods).reshape(h * w, 32).tile(2)
        return angles.sin(), angles.cos()

    def forward(self, crops: list[Tensor], masks: list[Tensor | None]) -> list[Tensor]:
        outputs = []
        for x, mask in zip(crops, masks, strict=True):
            rope = self.rope(x.shape[2] // 16, x.shape[3] // 16)
            x = self.patch_embed(x).flatten(2).transpose(1, 2)
            if mask is not None:
                x = torch.where(mask[..., None], self.mask_token.to(x.dtype), x)
            x = torch.cat([self.prefix.to(x.dtype).expand(len(x), -1, -1), x], dim=1)
            for block in self.blocks:
                x = block(x, rope)
            outputs.append(self.norm(x))
        return outputs


class PlainHead(nn.Module):
    def __init__(self, prototypes: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(DIM, 2048), nn.GELU(), nn.Linear(2048, 2048), nn.GELU(), nn.Linear(2048, 256)
        )
        self.last_layer = nn.Linear(256, prototypes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last_layer(F.normalize(self.mlp(x), dim=-1, eps=1e-6))


@torch.no_grad()
def plain_sinkhorn(logits: Tensor) -> Tensor:
    Q = torch.exp(logits.float() / TEACHER_TEMPERATURE).t()
    K, B = Q.shape
    Q /= Q.sum()
    for _ in range(3):
        Q /= Q.sum(dim=1, keepdim=True)
        Q /= K
        Q /= Q.sum(dim=0, keepdim=True)
        Q /= B
    return (Q * B).t()


def plain_koleo(x: Tensor) -> Tensor:
    x = F.normalize(x, eps=1e-8, dim=-1)
    with torch.no_grad():
        nearest = (x @ x.T).fill_diagonal_(-1).argmax(dim=1)
    return -torch.log(F.pairwise_distance(x, x[nearest]) + 1e-8).mean()


def plain_cross_entropy(student: Tensor, targets: Tensor) -> Tensor:
    """Pairs [S, T] of logits [S, B, K] and probabilities [T, B, K]."""
    return -torch.einsum("sbk,tbk->st", F.log_softmax(student.float() / 0.1, dim=-1), targets)


def plain_step(batch: int, precision: str, drop_path: float, prototypes: int) -> Callable[[], float]:
    def build() -> nn.ModuleDict:
        heads = {"dino_head": PlainHead(prototypes), "ibot_head": PlainHead(prototypes)}
        return nn.ModuleDict({"backbone": PlainViT(drop_path), **heads})

    student, teacher = build(), build()
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False).eval()
    optimizer = torch.optim.AdamW(student.parameters(), lr=LR, weight_decay=WEIGHT_DECAY, fused=True)
    crops, local, masks = inputs(batch)

    def step() -> float:
        B = batch
        index, counts = masks.flatten().nonzero().flatten(), masks.sum(1).clamp(min=1)
        weight = (1 / counts)[:, None].expand_as(masks)[masks]
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            with torch.no_grad():
                (seen,) = teacher["backbone"]([crops], [None])
                dino_targets = plain_sinkhorn(teacher["dino_head"](seen[:, 0])).view(2, B, -1)
                ibot_targets = plain_sinkhorn(teacher["ibot_head"](seen[:, 5:].flatten(0, 1)[index]))
            seen, small = student["backbone"]([crops, local], [masks, None])
            z = student["dino_head"](torch.cat([seen[:, 0], small[:, 0]]))
            pairs = plain_cross_entropy(z[: 2 * B].view(2, B, -1), dino_targets).fill_diagonal_(0).sum()
            loss = (pairs + plain_cross_entropy(z[2 * B :].view(8, B, -1), dino_targets).sum()) / (18 * B)
            z = student["ibot_head"](seen[:, 5:].flatten(0, 1)[index])
            tokens = -(ibot_targets * F.log_softmax(z.float() / 0.1, dim=-1)).sum(-1)
            loss = loss + (tokens * weight).sum() / len(masks)
            loss = loss + 0.1 * sum(plain_koleo(x.float()) for x in seen[:, 0].chunk(2))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for module in student.values():
            nn.utils.clip_grad_norm_(module.parameters(), CLIP)
        optimizer.step()
        with torch.no_grad():
            ours, theirs = list(teacher.parameters()), list(student.parameters())
            torch._foreach_mul_(ours, MOMENTUM)
            torch._foreach_add_(ours, theirs, alpha=1 - MOMENTUM)
        return loss.item()

    return step


def inputs(batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Global crops [2B, 3, 224, 224], local crops [8B, 3, 96, 96], masks [2B, 196]."""
    from densedino.pretrain.masking import draw_masks

    masks = draw_masks((14, 14), batch_size=batch, seed=0, step=0).flatten(0, 1)
    return torch.randn(2 * batch, 3, 224, 224), torch.randn(8 * batch, 3, 96, 96), masks


def our_step(batch: int, precision: str, drop_path: float, prototypes: int) -> Callable[[], float]:
    from densedino.pretrain.crops import CropConfig, Crops
    from densedino.pretrain.schedules import constant
    from densedino.pretrain.settings import HeadConfig, OptimizerConfig, Resolution, RunConfig, StageConfig
    from densedino.pretrain.step import Batch, step_values, train_step
    from densedino.pretrain.student_teacher import StudentTeacher, make_optimizer

    optimizer = OptimizerConfig(
        lr=constant(LR),
        lr_scaling="none",
        weight_decay=constant(WEIGHT_DECAY),
        momentum=constant(MOMENTUM),
        teacher_temperature=constant(TEACHER_TEMPERATURE),
        clip=CLIP,
    )
    stage = StageConfig(
        name="pretrain",
        steps=1000,
        batch_size=batch,
        resolutions=(Resolution(crops=CropConfig(mean=(0.5,) * 3, std=(0.25,) * 3)),),
        optimizer=optimizer,
        drop_path=drop_path,
    )
    head = HeadConfig(num_prototypes=prototypes)
    config = RunConfig(model="vits16", stages=(stage,), dino_head=head, ibot_head=head)
    state = StudentTeacher(config)
    adamw = make_optimizer(state.student, stage.optimizer, fidelity="released")
    crops, local, masks = inputs(batch)
    images = Batch(
        crops=Crops(global_crops=crops.unflatten(0, (2, batch)), local_crops=local.unflatten(0, (8, batch))),
        masks=masks.unflatten(0, (2, batch)),
        sample_ids=tuple(map(str, range(batch))),
        places=range(batch),
    )
    values = step_values(stage, 0)
    return lambda: train_step(
        state, adamw, images, stage=stage, values=values, seed=0, step=0, precision=precision
    ).losses["total"]


def resident_mib(field: str) -> float:
    """VmRSS or VmHWM (its peak) of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def measure(build: Callable[..., Callable[[], float]], args: argparse.Namespace) -> None:
    clock = time.thread_time if args.cpu_time else time.perf_counter
    if args.cpu_time:
        torch.set_num_threads(1)
    torch.manual_seed(0)
    start, seconds = resident_mib("VmRSS"), []
    step = build(args.batches[0], args.precisions[0], args.drop_path, args.prototypes)
    for _ in range(args.steps + 2):
        before = clock()
        step()
        seconds.append(clock() - before)
    print(json.dumps([statistics.median(seconds[2:]), resident_mib("VmHWM") - start]))


def main(versions: dict[str, Callable[..., Callable[[], float]]], *, script: str, text: str | None) -> None:
    """Measure two versions of the step in turns; the second is ours."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", nargs="+", type=int, default=[4, 8])
    parser.add_argument("--precisions", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--drop-path", type=float, default=0.0)
    parser.add_argument("--prototypes", type=int, default=65536)
    parser.add_argument("--rounds", type=int, default=2, help="processes of each version")
    parser.add_argument("--steps", type=int, default=4, help="timed steps in each process")
    parser.add_argument("--cpu-time", action="store_true", help="one thread, by its own time: on a busy machine")
    parser.add_argument("--measure", choices=list(versions), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(versions[args.measure], args)
        return
    threads = "1 thread, its own time" if args.cpu_time else f"{torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {threads}, drop path {args.drop_path}, {args.prototypes} prototypes")
    theirs, ours = versions
    print(f"images precision  {theirs} s  {ours} s  {theirs} ÷ {ours}  {theirs} MiB  {ours} MiB  {ours} ÷ {theirs}")
    for batch in args.batches:
        for precision in args.precisions:
            best: dict[str, list[float]] = {}
            options = ["--drop-path", args.drop_path, "--prototypes", args.prototypes, "--steps", args.steps]
            options += ["--cpu-time"] if args.cpu_time else []
            for version in (theirs, ours) * args.rounds:
                call = [sys.executable, script, "--measure", version, "--batches", batch, "--precisions", precision]
                out = subprocess.run(
                    list(map(str, call + options)), check=True, stdout=subprocess.PIPE, text=True
                ).stdout
                found = json.loads(out.splitlines()[-1])
                best[version] = [min(pair) for pair in zip(found, best.get(version, found), strict=True)]
            (slow, large), (fast, small) = best[theirs], best[ours]
            print(
                f"{batch:6} {precision:9} {slow:8.2f} {fast:7.2f} {slow / fast:8.2f} {large:10.0f} {small:9.0f} "
                f"{small / large:8.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main({"plain": plain_step, "ours": our_step}, script=__file__, text=__doc__)
