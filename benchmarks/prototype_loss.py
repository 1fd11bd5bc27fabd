"""Prints time and peak memory of the iBOT loss with and without logits, forward and backward, side by side.

    python benchmarks/prototype_loss.py [tokens] [prototypes] [dim]

"plain" is the usual way: logits of teacher and student held whole, Sinkhorn-Knopp in place on their exponentials,
autograd. Each version runs in processes of its own, in turns, best of nine; memory is what the peak adds to the
inputs (Linux).
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from densedino.pretrain.losses import masked_token_weights
from densedino.pretrain.prototypes import PrototypeTargets, prototype_ibot_loss


def plain(student, prototypes, teacher, frozen, masks):
    with torch.no_grad():
        Q = torch.exp(teacher @ frozen.T / 0.07).T
        Q /= Q.sum()
        for _ in range(3):
            Q /= Q.sum(1, keepdim=True) * len(Q)
            Q /= Q.sum(0, keepdim=True) * Q.shape[1]
        Q *= Q.shape[1]
    log_p = F.log_softmax(student @ prototypes.T / 0.1, dim=-1)
    return -((Q.T * log_p).sum(-1) * masked_token_weights(masks)).sum()


def blocks(student, prototypes, teacher, frozen, masks):
    targets = PrototypeTargets(teacher, frozen, temperature=0.07)
    return prototype_ibot_loss(student, prototypes, targets=targets, masks=masks)


def peak_mib(status: Path = Path("/proc/self/status")) -> float:
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) / 1024


def measure(version: str, tokens: int, K: int, d: int) -> None:
    torch.manual_seed(0)
    masks = torch.ones(tokens // 32, 32, dtype=torch.bool)
    student = F.normalize(torch.randn(masks.numel(), d), dim=1).requires_grad_()
    teacher = F.normalize(torch.randn(masks.numel(), d), dim=1)
    prototypes, frozen = (0.02 * torch.randn(K, d)).requires_grad_(), 0.02 * torch.randn(K, d)
    start, seconds = peak_mib(), []
    for _ in range(3):
        student.grad = prototypes.grad = None
        before = time.perf_counter()
        loss = {"plain": plain, "blocks": blocks}[version](student, prototypes, teacher, frozen, masks)
        loss.backward()
        seconds.append(time.perf_counter() - before)
    print(min(seconds), peak_mib() - start, loss.item(), prototypes.grad.norm().item())


def main(tokens: int = 2048, K: int = 65536, d: int = 256) -> None:
    shape = [str(tokens), str(K), str(d)]
    results: dict[str, list[float]] = {}
    for version in ("plain", "blocks") * 3:
        out = subprocess.run([sys.executable, __file__, version, *shape], check=True, capture_output=True, text=True)
        seconds, *rest = (float(x) for x in out.stdout.split())
        results[version] = [min(seconds, *results.get(version, [seconds])[:1]), *rest]
    for version, (seconds, mib, loss, norm) in results.items():
        print(f"{version:7} {seconds:6.2f} s  {mib:6.0f} MiB  loss {loss:.6f}  prototype gradient {norm:.6e}")
    (s, m, *_), (S, M, *_) = results["blocks"], results["plain"]
    print(f"{tokens} tokens, {K} prototypes, {d} dims, {torch.get_num_threads()} threads: blocks ÷ plain", end=" ")
    print(f"time {s / S:.2f}, memory {m / M:.2f}")


if __name__ == "__main__":
    if sys.argv[1:2] in (["plain"], ["blocks"]):
        measure(sys.argv[1], *map(int, sys.argv[2:]))
    else:
        main(*map(int, sys.argv[1:]))
