"""Twenty steps follow a plain implementation, written apart: whole logits, plain Sinkhorn, loops, AdamW by hand.

The plain one reads the same initial weights, crops and masks and shares no code with the package: backbone, heads,
losses, schedules, optimizer, clipping and moving average are spelled out below, in float64.
"""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from densedino.pretrain.crops import CropConfig, Crops
from densedino.pretrain.schedules import CosineSchedule, StagedSchedule, constant
from densedino.pretrain.settings import (
    GramConfig,
    HeadConfig,
    LossConfig,
    OptimizerConfig,
    Resolution,
    RunConfig,
    StageConfig,
)
from densedino.pretrain.step import Batch, step_values, train_step
from densedino.pretrain.student_teacher import StudentTeacher, make_optimizer

STEPS, B, G, L, K = 20, 6, 2, 3, 48


def stage_and_run(model: str, gram: GramConfig | None) -> tuple[StageConfig, RunConfig]:
    stage = StageConfig(
        name="only",
        start="random",
        steps=STEPS,
        batch_size=B,
        resolutions=(Resolution(crops=CropConfig(mean=(0.5,) * 3, std=(0.5,) * 3)),),
        optimizer=OptimizerConfig(
            lr=CosineSchedule(base=0.02, final=1e-4, total_steps=STEPS, warmup_steps=5),
            weight_decay=CosineSchedule(base=0.04, final=0.4, total_steps=STEPS),
            momentum=CosineSchedule(base=0.9, final=1.0, total_steps=STEPS),
            teacher_temperature=StagedSchedule(start=0.04, peak=0.07, end=0.07, warmup_steps=10),
            last_layer_freeze_steps=2,
            betas=(0.9, 0.99),
            clip=1.0,
            layer_decay=0.8,
        ),
        losses=LossConfig(
            koleo_weight=0.1, local_weight=StagedSchedule(start=1.0, peak=1.0, end=0.5, cosine_steps=15), gram=gram
        ),
    )
    head = HeadConfig(hidden_dim=24, bottleneck_dim=16, num_prototypes=K)
    return stage, RunConfig(
        model=model, stages=(stage,), dino_head=head, ibot_head=replace(head, num_prototypes=K // 2), seed=5
    )


def batch_of(step: int, *, gram_size: int | None) -> Batch:
    g = torch.Generator().manual_seed(1000 + step)
    masks = torch.zeros(G, B, 9, dtype=torch.bool)
    for crop, image in ((0, 0), (0, 3), (1, 1), (1, 2), (1, 5)):  # half of the crops; some with one masked patch only
        count = int(torch.randint(1, 6, (1,), generator=g))
        masks[crop, image, torch.randperm(9, generator=g)[:count]] = True
    crops = Crops(
        global_crops=torch.randn(G, B, 3, 48, 48, generator=g),
        local_crops=torch.randn(L, B, 3, 16, 32, generator=g),
        gram_crops=None if gram_size is None else torch.randn(G, B, 3, gram_size, gram_size, generator=g),
    )
    return Batch(crops=crops, masks=masks, sample_ids=tuple("abcdef"), places=range(B))


# ---------------------------------------------------------------------------------------------------- the plain one


def norm(x: Tensor, p: dict[str, Tensor], name: str) -> Tensor:
    mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
    return (x - mean) / (var + 1e-5).sqrt() * p[f"{name}.weight"] + p[f"{name}.bias"]


def plain_vit(p: dict[str, Tensor], images: Tensor, mask: Tensor | None, *, local: bool) -> tuple[Tensor, Tensor]:
    """CLS [B, D] and patches [B, N, D] after the final norm; `p` under the backbone's names."""
    h, w = images.shape[2] // 16, images.shape[3] // 16
    pixels = images.unfold(2, 16, 16).unfold(3, 16, 16).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    x = pixels @ p["patch_embed.proj.weight"].flatten(1).T + p["patch_embed.proj.bias"]
    if mask is not None:
        x = torch.where(mask[..., None], p["mask_token"], x)
    n, D = len(x), x.shape[-1]
    x = torch.cat([p["cls_token"].expand(n, 1, D), p["storage_tokens"].expand(n, 4, D), x], dim=1)
    d = D // 2  # two heads
    angles = torch.zeros(x.shape[1], d // 2, dtype=x.dtype)
    for row, col in itertools.product(range(h), range(w)):
        for i in range(d // 4):
            period = 100.0 ** (2 * i / (d / 2))
            angles[5 + row * w + col, i] = 2 * math.pi * (2 * (row + 0.5) / h - 1) / period
            angles[5 + row * w + col, d // 4 + i] = 2 * math.pi * (2 * (col + 0.5) / w - 1) / period
    turn = torch.polar(torch.ones_like(angles), angles)

    def rotated(t: Tensor) -> Tensor:  # channels i and i + d/2 are a complex number
        z = torch.complex(t[..., : d // 2], t[..., d // 2 :]) * turn
        return torch.cat([z.real, z.imag], dim=-1)

    for block in sorted({int(m[1]) for name in p if (m := re.match(r"blocks\.(\d+)\.", name))}):
        b = f"blocks.{block}"
        qkv = norm(x, p, f"{b}.norm1") @ p[f"{b}.attn.qkv.weight"].T
        if f"{b}.attn.qkv.bias" in p:
            qkv = qkv + p[f"{b}.attn.qkv.bias"] * torch.cat([torch.ones(D), torch.zeros(D), torch.ones(D)])
        q, k, v = qkv.split(D, dim=-1)
        heads = []
        for part in (slice(0, d), slice(d, D)):
            scores = rotated(q[..., part]) @ rotated(k[..., part]).transpose(1, 2) / math.sqrt(d)
            heads.append(torch.softmax(scores, dim=-1) @ v[..., part])
        out = torch.cat(heads, dim=-1) @ p[f"{b}.attn.proj.weight"].T + p[f"{b}.attn.proj.bias"]
        x = x + out * p[f"{b}.ls1.gamma"]
        y = norm(x, p, f"{b}.norm2")
        if f"{b}.mlp.w1.weight" in p:
            gate, value = (y @ p[f"{b}.mlp.{m}.weight"].T + p[f"{b}.mlp.{m}.bias"] for m in ("w1", "w2"))
            out = (gate * torch.sigmoid(gate) * value) @ p[f"{b}.mlp.w3.weight"].T + p[f"{b}.mlp.w3.bias"]
        else:
            y = y @ p[f"{b}.mlp.fc1.weight"].T + p[f"{b}.mlp.fc1.bias"]
            y = y * 0.5 * (1 + torch.erf(y / math.sqrt(2)))
            out = y @ p[f"{b}.mlp.fc2.weight"].T + p[f"{b}.mlp.fc2.bias"]
        x = x + out * p[f"{b}.ls2.gamma"]
    first = "local_cls_norm" if local and "local_cls_norm.weight" in p else "norm"
    return norm(x[:, 0], p, first), norm(x[:, 5:], p, "norm")


def plain_logits(p: dict[str, Tensor], head: str, x: Tensor) -> Tensor:
    for layer in (0, 2, 4):
        x = x @ p[f"{head}.mlp.{layer}.weight"].T + p[f"{head}.mlp.{layer}.bias"]
        x = x * 0.5 * (1 + torch.erf(x / math.sqrt(2))) if layer < 4 else x
    return x / x.norm(dim=-1, keepdim=True) @ p[f"{head}.last_layer.weight"].T


def plain_sinkhorn(logits: Tensor, temperature: float) -> Tensor:
    q = torch.exp(logits / temperature)
    q = q / q.sum()
    for _ in range(3):
        q = q / q.sum(0, keepdim=True) / q.shape[1]
        q = q / q.sum(1, keepdim=True) / q.shape[0]
    return q * q.shape[0]


def within(p: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    return {name[len(part) + 1 :]: value for name, value in p.items() if name.startswith(part + ".")}


class Plain:
    """Student, teacher, moments; one method that makes a step."""

    def __init__(self, weights: dict[str, Tensor], gram: GramConfig | None) -> None:
        self.student = {name: value.double().clone().requires_grad_() for name, value in weights.items()}
        self.teacher = {name: value.double().clone() for name, value in weights.items()}
        self.anchor = {k: v.clone() for k, v in within(self.teacher, "backbone").items()}
        self.gram = gram
        self.moments = {name: (torch.zeros_like(v), torch.zeros_like(v)) for name, v in self.teacher.items()}

    def losses(self, batch: Batch, *, temperature: float) -> dict[str, Tensor]:
        s, t = self.student, self.teacher
        views = [x.double() for x in batch.crops.global_crops]
        with torch.no_grad():
            seen = [plain_vit(within(t, "backbone"), x, None, local=False) for x in views]
            q = plain_sinkhorn(torch.cat([plain_logits(t, "dino_head", c) for c, _ in seen]), temperature)
            targets = q.split(B)
            masked = torch.cat([patches[m] for (_, patches), m in zip(seen, batch.masks, strict=True)])
            patch_targets = plain_sinkhorn(plain_logits(t, "ibot_head", masked), temperature)
        ours = [plain_vit(within(s, "backbone"), x, m, local=False) for x, m in zip(views, batch.masks, strict=True)]
        small = [plain_vit(within(s, "backbone"), x.double(), None, local=True)[0] for x in batch.crops.local_crops]

        def entropy(cls: Tensor, target: Tensor) -> Tensor:
            return -(target * torch.log_softmax(plain_logits(s, "dino_head", cls) / 0.1, -1)).sum(-1).mean()

        pairs = G * (G - 1) + G * L
        dino_global = [entropy(ours[i][0], targets[j]) / pairs for i in range(G) for j in range(G) if i != j]
        dino_local = [entropy(cls, target) / pairs for cls in small for target in targets]
        ibot, row = torch.zeros((), dtype=torch.float64), 0
        for (_, patches), mask in zip(ours, batch.masks, strict=True):
            for image in range(B):
                if count := int(mask[image].sum()):
                    log_p = torch.log_softmax(plain_logits(s, "ibot_head", patches[image][mask[image]]) / 0.1, -1)
                    ibot = ibot - (patch_targets[row : row + count] * log_p).sum() / count / (G * B)
                    row += count
        koleo = torch.zeros((), dtype=torch.float64)
        for cls, _ in ours:
            unit = cls / cls.norm(dim=-1, keepdim=True)
            for i in range(B):
                nearest = max(
                    (j for j in range(B) if j != i), key=lambda j, i=i: float(unit[i].detach() @ unit[j].detach())
                )
                koleo = koleo - torch.log((unit[i] - unit[nearest]).norm() + 1e-8) / B
        found = {"dino_global": sum(dino_global), "dino_local": sum(dino_local), "ibot": ibot, "koleo": koleo}
        if self.gram is not None:
            found["gram"] = self.anchoring([p for _, p in ours], [p for _, p in seen], batch)
        return found

    def anchoring(self, ours: list[Tensor], ema: list[Tensor], batch: Batch) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for crop in range(G):
            with torch.no_grad():
                theirs = ema[crop]
                if self.gram.source == "checkpoint":
                    crops = batch.crops.global_crops if batch.crops.gram_crops is None else batch.crops.gram_crops
                    theirs = plain_vit(self.anchor, crops[crop].double(), None, local=False)[1]
                    side = math.isqrt(theirs.shape[1])
                    if side != 3:
                        grid = theirs.transpose(1, 2).unflatten(2, (side, side))
                        theirs = F.interpolate(grid, (3, 3), mode="bicubic").flatten(2).transpose(1, 2)
                theirs = theirs / theirs.norm(dim=-1, keepdim=True)
            mine = ours[crop] / ours[crop].norm(dim=-1, keepdim=True)
            for image in range(B):
                a, b = mine[image] @ mine[image].T, theirs[image] @ theirs[image].T
                if self.gram.remove_neg:
                    a, b = a.clamp(min=0), b.clamp(min=0)
                total = total + ((a - b) ** 2).mean() / (G * B)
        return total

    def step(self, batch: Batch, stage: StageConfig, step: int) -> dict[str, float]:
        o, gram = stage.optimizer, self.gram
        if gram is not None and gram.first_update is not None and step >= gram.first_update:
            since = step - gram.first_update
            if since % gram.update_every == 0 and since // gram.update_every < gram.max_updates:
                self.anchor = {k: v.clone() for k, v in within(self.teacher, "backbone").items()}
        found = self.losses(batch, temperature=0.04 + 0.03 * min(step, 10) / 10)
        weights = {"dino_global": 1.0, "dino_local": stage.losses.local_weight(step), "ibot": 1.0, "koleo": 0.1}
        weights["gram"] = gram.weight(step) if gram is not None else 0.0
        total = sum(weights[name] * value for name, value in found.items())
        grads = dict(zip(self.student, torch.autograd.grad(total, list(self.student.values())), strict=True))
        lr = o.lr(step) * 4 * math.sqrt(B / 1024)
        decay = 0.4 + (0.04 - 0.4) * (1 + math.cos(math.pi * step / STEPS)) / 2
        for part in ("backbone", "dino_head", "ibot_head"):
            norm_ = math.sqrt(sum(float((grads[n] ** 2).sum()) for n in grads if n.startswith(part)))
            for name in grads:
                if name.startswith(part):
                    grads[name] = grads[name] * min(1.0, o.clip / (norm_ + 1e-6))
        with torch.no_grad():
            for name, value in self.student.items():
                rate, wd = lr * self.multiplier(name), decay
                if name.endswith("last_layer.weight") and step < 2:
                    rate = 0.0
                if name.endswith("bias") or "norm" in name or "gamma" in name:
                    wd = 0.0
                m, v = self.moments[name]
                m += (1 - 0.9) * (grads[name] - m)
                v += (1 - 0.99) * (grads[name] ** 2 - v)
                value -= rate * wd * value
                m_hat, v_hat = m / (1 - 0.9 ** (step + 1)), v / (1 - 0.99 ** (step + 1))
                value -= rate * m_hat / (v_hat.sqrt() + 1e-8)
                momentum = 1.0 + (0.9 - 1.0) * (1 + math.cos(math.pi * step / STEPS)) / 2
                self.teacher[name] = momentum * self.teacher[name] + (1 - momentum) * value
        return {name: value.item() for name, value in (found | {"total": total}).items()}

    @staticmethod
    def multiplier(name: str) -> float:
        """Of two blocks: the embeddings are layer 0, blocks 1 and 2, the final norm 3; heads have 1."""
        if match := re.match(r"backbone\.blocks\.(\d)\.", name):
            return 0.8 ** (3 - 1 - int(match[1]))
        if name.startswith("backbone.patch_embed"):
            return 0.2 * 0.8**3
        return 0.8**3 if name.startswith("backbone.") and "token" in name else 1.0


ANCHORS = {
    "none": (None, None),
    "checkpoint": (
        GramConfig(
            weight=StagedSchedule(start=0.5, peak=2.0, end=1.0, warmup_steps=5, cosine_steps=10),
            first_update=4,
            update_every=3,
            max_updates=3,
        ),
        80,
    ),
    "ema": (GramConfig(weight=constant(2.0), source="ema", remove_neg=True), None),
}


@pytest.mark.parametrize("model", ["debug_vit", "debug_vit_swiglu"])
@pytest.mark.parametrize("anchor", ANCHORS)
def test_twenty_steps_follow_the_plain_implementation(model: str, anchor: str) -> None:
    gram, gram_size = ANCHORS[anchor]
    stage, config = stage_and_run(model, gram)
    state = StudentTeacher(config)
    with torch.no_grad():  # as after some training: a fresh model's branches are a hundred thousand times smaller
        for name, parameter in state.student.named_parameters():
            if "gamma" in name:
                parameter.uniform_(0.2, 1.0, generator=torch.Generator().manual_seed(len(name)))
            elif parameter.ndim > 1:
                parameter.mul_(4.0)
        for ours, theirs in zip(state.teacher.parameters(), state.student.parameters(), strict=True):
            ours.copy_(theirs)
    state.set_gram_teacher(state.teacher.backbone if anchor == "checkpoint" else None)
    optimizer = make_optimizer(state.student, stage.optimizer, fidelity="released")
    plain = Plain(dict(state.student.named_parameters()), gram)
    for step in range(STEPS):
        batch = batch_of(step, gram_size=gram_size)
        report = train_step(
            state, optimizer, batch, stage=stage, values=step_values(stage, step), seed=config.seed, step=step
        )
        expected = plain.step(batch, stage, step)
        assert report.finite
        assert report.losses.keys() == expected.keys()
        for name, value in expected.items():
            assert report.losses[name] == pytest.approx(value, rel=1e-4), (step, name)
        assert report.gram_refreshed == (anchor == "checkpoint" and step in (4, 7, 10))
    for network, weights in ((state.student, plain.student), (state.teacher, plain.teacher)):
        for name, parameter in network.named_parameters():
            gap = (parameter.double() - weights[name]).norm() / weights[name].norm().clamp(min=1e-2)
            assert gap < 1e-3, name
