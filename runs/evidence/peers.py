"""Trains peers' methods at equal images seen, on the same crops with the same optimizer, and prints what they learnt.

    python -m venv /opt/peers && /opt/peers/bin/pip install . timm lightly stable-pretraining 'lightning<2.6'
    python runs/evidence/method.py OUT --variants base            ours
    /opt/peers/bin/python runs/evidence/peers.py OUT              theirs; goes on with the next run where it stopped
    /opt/peers/bin/python runs/evidence/peers.py OUT --table

"lightly" is its DINO: centring, 2,048 outputs, no masks. "sp_dinov2" and "sp_dinov3" are stable-pretraining's modules
of these names, called without its trainer (lightning had malware releases in 2026-04; an older one is only imported).
All have timm's ViT of the size of `method.py`, its crops, batch, schedules and EMA; the library's monitor evaluates.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from method import DATA, SPEC, base, options, table
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from densedino.pretrain.loading import Loader
from densedino.pretrain.look_files import LookRecord, read_looks, write_look
from densedino.pretrain.looks import Observer
from densedino.pretrain.randomness import counted_seed
from densedino.pretrain.sources import open_sources
from densedino.pretrain.step import step_values

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from densedino.pretrain.step import Batch

    Loss = Callable[[Batch, float], Tensor]


def timm_vit(registers: int = 0) -> VisionTransformer:
    return VisionTransformer(
        img_size=96,
        patch_size=16,
        embed_dim=SPEC.embed_dim,
        depth=SPEC.depth,
        num_heads=SPEC.num_heads,
        mlp_ratio=SPEC.hidden_dim / SPEC.embed_dim,
        num_classes=0,
        reg_tokens=registers,
        dynamic_img_size=True,
    )


class Peer(nn.Module):
    """A student, its moving average, and a loss of crops."""

    def __init__(self, student: nn.Module, teacher: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.student, self.teacher, self.loss = student, teacher.requires_grad_(False), loss


def lightly_dino() -> tuple[Peer, Callable[[Tensor], Tensor]]:
    from lightly.loss import DINOLoss
    from lightly.models.modules import DINOProjectionHead

    def network(freeze: int) -> nn.ModuleDict:
        head = DINOProjectionHead(SPEC.embed_dim, 512, 128, 2048, batch_norm=False, freeze_last_layer=freeze)
        return nn.ModuleDict({"backbone": timm_vit(), "head": head})

    student, teacher = network(-1), network(-1)
    teacher.load_state_dict(student.state_dict())
    criterion = DINOLoss(output_dim=2048)

    def out(net: nn.Module, crops: Tensor) -> Tensor:
        return net["head"](net["backbone"].forward_features(crops)[:, 0])

    def loss(batch: Batch, temperature: float) -> Tensor:
        with torch.no_grad():
            wanted = [out(teacher, x) for x in batch.crops.global_crops]
        said = [out(student, x) for x in (*batch.crops.global_crops, *batch.crops.local_crops)]
        return criterion(wanted, said, teacher_temp=temperature)

    return Peer(student, teacher, loss), lambda x: teacher["backbone"].forward_features(x)


def stable_pretraining(name: str) -> tuple[Peer, Callable[[Tensor], Tensor]]:
    from stable_pretraining import methods

    registers = {"n_register_tokens": 4} if name == "DINOv3" else {}
    module: Any = getattr(methods, name)(
        timm_vit(),
        projector_hidden_dim=512,
        projector_bottleneck_dim=128,
        n_cls_prototypes=2048,
        n_patch_prototypes=2048,
        image_size=96,
        **registers,
    )
    parts = ("backbone", "cls_head", "patch_head")
    student = nn.ModuleDict({part: getattr(module, part).student for part in parts})
    student.register_parameter("mask_token", module.mask_token)
    teacher = nn.ModuleDict({part: getattr(module, part).teacher for part in parts})
    teacher.register_parameter("mask_token", copy.deepcopy(module.mask_token))

    def loss(batch: Batch, temperature: float) -> Tensor:
        module.train()
        module.temperature_teacher = temperature
        loss: Tensor = module(
            global_views=list(batch.crops.global_crops), local_views=list(batch.crops.local_crops)
        ).loss
        return loss

    def tokens(x: Tensor) -> Tensor:
        out: Tensor = module._encode(module.backbone.teacher, x)
        return torch.cat([out[:, :1], out[:, 1 + registers.get("n_register_tokens", 0) :]], dim=1)

    return Peer(student, teacher, loss), tokens


PEERS = {
    "lightly": lightly_dino,
    "sp_dinov2": lambda: stable_pretraining("DINOv2"),
    "sp_dinov3": lambda: stable_pretraining("DINOv3"),
}


class Tokens(nn.Module):
    """A peer's teacher as the library's monitor calls it."""

    def __init__(self, teacher: nn.Module, tokens: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.teacher, self.tokens = teacher.eval(), tokens
        self.eval()

    def forward(self, x: Tensor, *, is_training: bool) -> dict[str, Tensor]:
        out = self.tokens(x)
        return {"x_norm_clstoken": out[:, 0], "x_norm_patchtokens": out[:, 1:]}


def train(name: str, *, seed: int, steps: int, output: Path) -> None:
    config = base(steps)
    (stage,) = config.stages
    torch.manual_seed(seed)
    peer, tokens = PEERS[name]()
    learnt = list(peer.student.parameters())
    optimizer = torch.optim.AdamW(learnt, lr=1e-3, fused=True)
    sources = open_sources(config.data, stages=config.stages)
    counted = counted_seed("stage", seed=seed, index=0)
    loader = Loader(sources, stage=stage, seed=counted, data=config.data, steps=range(steps))
    for step, batch in enumerate(loader):
        values = step_values(stage, step)
        for group in optimizer.param_groups:
            group["lr"], group["weight_decay"] = values.lr, values.weight_decay
        with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16"):
            loss = peer.loss(batch, values.teacher_temperature)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(learnt, stage.optimizer.clip)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(peer.teacher.parameters()), learnt, 1 - values.momentum)
        if step % 50 == 0:
            print(name, seed, step, round(loss.item(), 4), flush=True)
    crops = stage.resolutions[0].crops
    look = Observer(config.monitor, sources=sources, mean=crops.mean, std=crops.std).look(Tokens(peer.teacher, tokens))
    write_look(output, LookRecord(step=0, stage="before"))  # `table` wants a first and a last look
    write_look(output, LookRecord(step=steps, stage=name, measures=look.measures))


def main() -> None:
    args = options(__doc__, "peers", PEERS)
    torch.set_num_threads(1)
    for seed in [] if args.table else args.seeds:
        for name in args.peers:
            output = args.out / f"{name}-{seed}"
            if len(read_looks(output)) < 2:
                train(name, seed=seed, steps=args.steps, output=output)
    table(args.out, ["base", *args.peers], args.seeds)


if __name__ == "__main__":
    assert DATA.is_dir(), f"no images at {DATA}"
    main()
