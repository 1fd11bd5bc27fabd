"""Owns the state that learns: a student, its EMA teacher, and perhaps a frozen Gram teacher."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from densedino.models.catalog import create_model
from densedino.pretrain.optim import adamw, parameter_groups
from densedino.pretrain.projection import ProjectionHead
from densedino.pretrain.randomness import counted_seed

if TYPE_CHECKING:
    from densedino.models.catalog import ConvNeXtSpec, ViTSpec
    from densedino.models.convnext import ConvNeXt
    from densedino.models.vit import VisionTransformer
    from densedino.pretrain import Fidelity
    from densedino.pretrain.settings import HeadConfig, OptimizerConfig, RunConfig

__all__ = ["Network", "StudentTeacher", "make_optimizer"]


class Network(nn.Module):
    """A backbone with the two projection heads: DINO's reads the CLS token, iBOT's the patches."""

    def __init__(
        self,
        spec: ViTSpec | ConvNeXtSpec,
        *,
        dino_head: HeadConfig,
        ibot_head: HeadConfig,
        in_chans: int = 3,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.backbone = create_model(spec, in_chans=in_chans, device=device)
        self.dino_head = _head(spec.embed_dim, dino_head, device)
        self.ibot_head = _head(spec.embed_dim, ibot_head, device)

    def parts(self) -> dict[str, nn.Module]:
        """What gradients are clipped by: each by itself."""
        return {"backbone": self.backbone, "dino_head": self.dino_head, "ibot_head": self.ibot_head}


class StudentTeacher(nn.Module):
    """Student and teacher networks of a run, and a Gram teacher where a stage has one.

    The teachers' parameters want no gradient, and teachers stay in eval mode, whatever `train` says. At the start the
    teacher equals the student; both are drawn from the run's seed, the same on every machine.

    Args:
        config: model, channels, heads and seed are read.
        device: where the parameters go; on "meta" nothing is drawn.

    Attributes:
        student: `.backbone`, `.dino_head`, `.ibot_head`.
        teacher: the same, the student's moving average.
        gram_teacher: a backbone or None; see `densedino.pretrain.gram`.
    """

    def __init__(self, config: RunConfig, *, device: torch.device | str = "cpu") -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(counted_seed("weights", seed=config.seed))
            self.student = Network(
                config.spec,
                in_chans=config.in_chans,
                dino_head=config.dino_head,
                ibot_head=config.ibot_head,
                device="meta" if torch.device(device).type == "meta" else "cpu",
            ).to(device)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.gram_teacher: VisionTransformer | ConvNeXt | None = None
        self.train()

    def train(self, mode: bool = True) -> StudentTeacher:
        """Set the student's mode; teachers stay in eval mode."""
        super().train(mode)
        self.teacher.eval()
        if self.gram_teacher is not None:
            self.gram_teacher.eval()
        return self

    def set_gram_teacher(self, backbone: VisionTransformer | ConvNeXt | None) -> None:
        """Freeze a copy of `backbone` as the Gram teacher; None removes it."""
        self.gram_teacher = None if backbone is None else copy.deepcopy(backbone).requires_grad_(False).eval()

    @torch.no_grad()
    def restart_from_teacher(self) -> None:
        """Give the student the teacher's weights: how a stage starts from the one before."""
        theirs: dict[str, Tensor] = dict(self.teacher.named_parameters())
        for name, parameter in self.student.named_parameters():
            parameter.copy_(theirs[name])


def make_optimizer(network: Network, config: OptimizerConfig, *, fidelity: Fidelity) -> torch.optim.AdamW:
    """AdamW over a student's parameters, in groups with their learning-rate and weight-decay multipliers."""
    groups = parameter_groups(
        network.backbone,
        heads=(network.dino_head, network.ibot_head),
        layer_decay=config.layer_decay,
        patch_embed_lr=config.patch_embed_lr,
        fidelity=fidelity,
    )
    return adamw(groups, betas=config.betas)


def _head(embed_dim: int, config: HeadConfig, device: torch.device | str | None) -> ProjectionHead:
    with torch.device(device or torch.get_default_device()):
        return ProjectionHead(
            embed_dim,
            hidden_dim=config.hidden_dim,
            bottleneck_dim=config.bottleneck_dim,
            num_prototypes=config.num_prototypes,
            num_layers=config.num_layers,
        )
