"""Prints time and peak memory of one training step, lightly's DINOv2 parts ÷ ours, side by side.

    python -m venv /opt/peers && /opt/peers/bin/pip install . lightly timm
    /opt/peers/bin/python benchmarks/training_peers.py --batches 4 --cpu-time      the options of train_step.py

ViT-S/16, crops, heads, masks and optimizer are those of `train_step.py`. lightly's side is what its DINOv2 example puts
together: timm's ViT behind `MaskedVisionTransformerTIMM`, two heads, `DINOLoss`, `IBOTPatchLoss` and `KoLeoLoss`. It
centres by a moving average where ours runs Sinkhorn-Knopp, so its targets cost less; its learned position embedding
takes the place of RoPE. stable-pretraining needs lightning, which this project avoids: it is not measured.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from lightly.loss import DINOLoss, IBOTPatchLoss, KoLeoLoss
from lightly.models.modules import DINOv2ProjectionHead, MaskedVisionTransformerTIMM
from lightly.models.utils import update_momentum
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from train_step import CLIP, DEPTH, DIM, HEADS, LR, MOMENTUM, TEACHER_TEMPERATURE, WEIGHT_DECAY, inputs, main, our_step

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


def lightly_step(batch: int, precision: str, drop_path: float, prototypes: int) -> Callable[[], float]:
    vit = VisionTransformer(
        img_size=224,
        patch_size=16,
        embed_dim=DIM,
        depth=DEPTH,
        num_heads=HEADS,
        init_values=1e-5,
        reg_tokens=4,
        drop_path_rate=drop_path,
        dynamic_img_size=True,
    )

    def network() -> nn.ModuleDict:
        heads = {
            name: DINOv2ProjectionHead(input_dim=DIM, output_dim=prototypes) for name in ("dino_head", "ibot_head")
        }
        return nn.ModuleDict({"backbone": MaskedVisionTransformerTIMM(vit=copy.deepcopy(vit)), **heads})

    student, teacher = network(), network()  # a head's weight norm cannot be copied
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False).eval()
    dino, ibot, koleo = DINOLoss(output_dim=prototypes), IBOTPatchLoss(output_dim=prototypes), KoLeoLoss()
    optimizer = torch.optim.AdamW(student.parameters(), lr=LR, weight_decay=WEIGHT_DECAY, fused=True)
    crops, local, masks = inputs(batch)
    prefix = vit.num_prefix_tokens
    seen = torch.cat([masks.new_zeros(len(masks), prefix), masks], dim=1)

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            with torch.no_grad():
                theirs: Tensor = teacher["backbone"].encode(crops)
                wanted = teacher["dino_head"](theirs[:, 0])
                patches = teacher["ibot_head"](theirs[:, prefix:][masks])
            ours: Tensor = student["backbone"].encode(crops, mask=seen)
            small: Tensor = student["backbone"].encode(local)
            cls = student["dino_head"](torch.cat([ours[:, 0], small[:, 0]]))
            loss = dino(
                teacher_out=list(wanted.float().chunk(2)),
                student_out=list(cls.float().split(batch)),
                teacher_temp=TEACHER_TEMPERATURE,
            )
            loss = loss + ibot(
                teacher_out=patches.float(),
                student_out=student["ibot_head"](ours[:, prefix:][masks]).float(),
                mask=masks.unflatten(1, (14, 14)),
                teacher_temp=TEACHER_TEMPERATURE,
            )
            loss = loss + 0.1 * sum(koleo(x.float()) for x in ours[:, 0].chunk(2))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for part in student.values():
            nn.utils.clip_grad_norm_(part.parameters(), CLIP)
        optimizer.step()
        update_momentum(student, teacher, m=MOMENTUM)
        return loss.item()

    return step


if __name__ == "__main__":
    main({"lightly": lightly_step, "ours": our_step}, script=__file__, text=__doc__)
