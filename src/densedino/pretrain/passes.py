"""Owns a step's forward and backward passes: teacher targets of the whole batch, then the student, part after part.

Once the targets stand, every student crop's loss depends on nothing but that crop and, for KoLeo, on its neighbours.
So global and local crops, and micro-batches, each go forward and backward by themselves: only one part's activations
are there at a time, and the sum of the gradients is that of the whole.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from densedino.pretrain.draws import draw
from densedino.pretrain.gram import anchor_loss, anchor_tokens
from densedino.pretrain.losses import crop_pair_weights, koleo_loss
from densedino.pretrain.parallel import whole
from densedino.pretrain.prototypes import PrototypeTargets, prototype_dino_loss, prototype_ibot_loss

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from densedino.pretrain.settings import StageConfig
    from densedino.pretrain.step import Batch, StepValues
    from densedino.pretrain.student_teacher import Network, StudentTeacher

__all__ = ["Passes", "Targets", "make_targets"]

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Targets:
    """What the teacher wants of the student on one micro-batch of b images with T global crops."""

    dino: PrototypeTargets
    """Rows [T, b]."""
    ibot: PrototypeTargets
    """Rows: the masked patches, in the order of `masks.flatten()`."""
    cls: Tensor
    """[T, b, D]: the teacher's CLS tokens."""
    patches: Tensor | None = None
    """[T·b, N, D]: its patch tokens, if they were asked for."""


@torch.no_grad()
def make_targets(
    teacher: Network,
    batches: Sequence[Batch],
    *,
    temperature: float,
    precision: Precision = "fp32",
    keep_patches: bool = False,
) -> list[Targets]:
    """Targets of every micro-batch, with one Sinkhorn-Knopp over all of them and over all processes.

    Args:
        teacher: in eval mode; it sees the global crops, unmasked.
        batches: the micro-batches of this process.
        temperature: the teacher's.
        precision: of its forward passes.
        keep_patches: keep all patch tokens, for a Gram teacher that is the EMA teacher.
    """
    tokens, dino, ibot = [], [], []
    for batch in batches:
        crops, chosen = batch.crops.global_crops.flatten(0, 1), _masked_rows(batch.masks)
        with _autocast(crops, precision):
            cls, patches = teacher.backbone.training_features(crops, patches=None if keep_patches else chosen)
            masked = patches.flatten(0, 1)[chosen] if keep_patches else patches
            dino.append(teacher.dino_head(cls))
            ibot.append(teacher.ibot_head(masked))
        tokens.append((cls, patches if keep_patches else None))
    dino_parts = _balanced(dino, whole(teacher.dino_head.last_layer.weight), temperature)
    ibot_parts = _balanced(ibot, whole(teacher.ibot_head.last_layer.weight), temperature)
    return [
        Targets(dino=d, ibot=i, cls=cls.float().unflatten(0, batch.masks.shape[:2]), patches=patches)
        for batch, d, i, (cls, patches) in zip(batches, dino_parts, ibot_parts, tokens, strict=True)
    ]


@dataclass(frozen=True, kw_only=True, eq=False)
class Passes:
    """The student's side of one step.

    Args:
        student: the network that learns.
        stage: losses, stochastic depth and RoPE are read.
        values: of this step.
        seed: of the run.
        step: what the draws are counted by.
        precision: of the forward passes.
        masked: the student sees the global crops masked; otherwise whole, and iBOT compares the same patches.
        anchor: holds the Gram teacher, where the stage has one.
    """

    student: Network
    stage: StageConfig
    values: StepValues
    seed: int
    step: int
    precision: Precision = "fp32"
    masked: bool = True
    anchor: StudentTeacher | None = None

    def run(self, batches: Sequence[Batch], targets: Sequence[Targets]) -> tuple[list[dict[str, Tensor]], Tensor]:
        """Add the gradients of the whole batch to the student's; returns what `backward` does, CLS as one tensor."""
        images = sum(map(len, batches))
        parts = [self.backward(b, t, share=len(b) / images) for b, t in zip(batches, targets, strict=True)]
        return [losses for losses, _ in parts], torch.cat([cls for _, cls in parts], dim=1)

    def backward(self, batch: Batch, targets: Targets, *, share: float = 1.0) -> tuple[dict[str, Tensor], Tensor]:
        """Add the gradients of one micro-batch, which is `share` of the batch, to the student's.

        Returns:
            The micro-batch's losses, without gradient: each term that counts, unweighted, and "total", their weighted
            sum. And the student's CLS tokens of the global crops [G, b, D].
        """
        weights, cls = self._weights(), targets.cls
        found: dict[str, Tensor] = {}
        total = torch.zeros((), device=cls.device)
        for run in (self._global_crops, self._local_crops):
            terms, tokens = run(batch, targets, {name for name, weight in weights.items() if weight > 0})
            if run == self._global_crops:
                cls = tokens.detach().float()
            if terms:
                loss = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
                (loss * share).backward()
                total = total + loss.detach()
                found |= {name: term.detach() for name, term in terms.items()}
        return found | {"total": total}, cls

    def _weights(self) -> dict[str, float]:
        losses, frozen = self.stage.losses, self.values.frozen_backbone  # what has no head moves the backbone only
        return {
            "dino_global": losses.dino_weight,
            "dino_local": losses.dino_weight * self.values.local_weight,
            "ibot": losses.ibot_weight,
            "koleo": 0.0 if frozen else losses.koleo_weight,
            "gram": 0.0 if frozen else self.values.gram_weight,
        }

    def _global_crops(self, batch: Batch, targets: Targets, wanted: set[str]) -> tuple[dict[str, Tensor], Tensor]:
        student, losses, masks = self.student, self.stage.losses, batch.masks.flatten(0, 1)
        (G, b), L = batch.masks.shape[:2], len(batch.crops.local_crops)
        crops, chosen = batch.crops.global_crops.flatten(0, 1), _masked_rows(masks)
        gram = losses.gram if "gram" in wanted else None
        with _autocast(crops, self.precision):
            cls, patches = self._tokens(
                crops, batch, range(G), masks=masks if self.masked else None, patches=chosen if gram is None else None
            )
            masked = patches if gram is None else patches.flatten(0, 1)[chosen]
            dino = student.dino_head(cls) if "dino_global" in wanted else None
            ibot = student.ibot_head(masked) if "ibot" in wanted else None
        cls = cls.unflatten(0, (G, b))
        terms: dict[str, Tensor] = {}
        temperature = losses.student_temperature
        if dino is not None:
            pairs = crop_pair_weights(G, L)[:G]
            weight = whole(student.dino_head.last_layer.weight)
            terms["dino_global"], _ = prototype_dino_loss(
                dino.unflatten(0, (G, b)), weight, targets=targets.dino, pair_weights=pairs, temperature=temperature
            )
        if ibot is not None:
            weight = whole(student.ibot_head.last_layer.weight)
            terms["ibot"] = prototype_ibot_loss(
                ibot, weight, targets=targets.ibot, masks=masks, temperature=temperature
            )
        if "koleo" in wanted:
            terms["koleo"] = torch.stack([self._koleo(crop) for crop in cls]).sum()
        if gram is not None:
            terms["gram"] = anchor_loss(patches, self._anchor(batch, targets), gram, masks=masks)
        return terms, cls

    def _local_crops(self, batch: Batch, targets: Targets, wanted: set[str]) -> tuple[dict[str, Tensor], Tensor]:
        L, b = batch.crops.local_crops.shape[:2]
        G = len(batch.masks)
        if L == 0 or "dino_local" not in wanted:
            return {}, targets.cls[:0]
        crops = batch.crops.local_crops.flatten(0, 1)
        with _autocast(crops, self.precision):
            none = torch.empty(0, dtype=torch.int64, device=crops.device)
            cls, _ = self._tokens(crops, batch, range(G, G + L), local=True, patches=none)
            dino = self.student.dino_head(cls).unflatten(0, (L, b))
        loss, _ = prototype_dino_loss(
            dino,
            whole(self.student.dino_head.last_layer.weight),
            targets=targets.dino,
            pair_weights=crop_pair_weights(G, L)[G:],
            temperature=self.stage.losses.student_temperature,
        )
        return {"dino_local": loss}, cls

    def _tokens(
        self,
        crops: Tensor,
        batch: Batch,
        numbers: range,
        *,
        patches: Tensor | None,
        masks: Tensor | None = None,
        local: bool = False,
    ) -> tuple[Tensor, Tensor]:
        backbone = self.student.backbone
        draws = draw(
            backbone.spec,
            seed=self.seed,
            step=self.step,
            places=batch.places,
            crops=numbers,
            drop_path=self.stage.drop_path,
            rope=self.stage.rope,
            device=crops.device,
        )
        with torch.set_grad_enabled(not self.values.frozen_backbone):
            return backbone.training_features(crops, masks=masks, draws=draws, local=local, patches=patches)

    def _koleo(self, cls: Tensor) -> Tensor:
        losses = self.stage.losses
        return koleo_loss(
            cls, topk=losses.koleo_topk, group_size=losses.koleo_group_size, distributed=losses.koleo_distributed
        )

    def _anchor(self, batch: Batch, targets: Targets) -> Tensor:
        """What the student's patch similarities are held to: [G·b, N, D]."""
        if targets.patches is not None:
            return targets.patches
        assert self.anchor is not None
        height, width = batch.crops.global_crops.shape[-2:]
        stride = self.student.backbone.stride
        shown = batch.crops.global_crops if batch.crops.gram_crops is None else batch.crops.gram_crops
        with _autocast(shown, self.precision):
            return anchor_tokens(self.anchor, shown.flatten(0, 1), grid=(height // stride, width // stride))


def _masked_rows(masks: Tensor) -> Tensor:
    """[M] int64: the masked patches' rows among all patches."""
    return masks.flatten().nonzero()[:, 0]


def _balanced(features: list[Tensor], prototypes: Tensor, temperature: float) -> list[PrototypeTargets]:
    """One set of targets over all micro-batches' features [r, d], cut into those of each."""
    targets = PrototypeTargets(torch.cat(features), prototypes, temperature=temperature)
    ends = list(itertools.accumulate(map(len, features)))
    return [targets.part(end - len(part), end) for part, end in zip(features, ends, strict=True)]


def _autocast(x: Tensor, precision: Precision) -> torch.autocast:
    return torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=precision == "bf16")
