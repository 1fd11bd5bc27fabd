"""Owns the closed-form start of a pruned ViT: cut matrices, then each branch's last map refitted by least squares.

The larger and the smaller model see the same images and walk side by side, block by block. What is refitted is asked
for the larger one's tokens from the smaller one's own activations, so that errors made so far are made good as well.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from densedino.models.catalog import create_model
from densedino.models.layers import GatedMlp
from densedino.pretrain.pruning import last_map

if TYPE_CHECKING:
    from collections.abc import Sequence

    from densedino.models.layers import Block, Mlp
    from densedino.models.vit import VisionTransformer
    from densedino.pretrain.pruning import Cut

__all__ = ["cut_model", "refit", "ridge"]

_RIDGE = 1e-3  # of the mean variance of a branch's columns


@torch.no_grad()
def cut_model(model: VisionTransformer, cut: Cut) -> VisionTransformer:
    """A copy of what is kept, LayerScale multiplied into the maps before it (and 1 then)."""
    small = create_model(cut.spec, in_chans=model.in_chans)
    blocks = tuple(f"blocks.{i}." for i in range(model.depth))
    small_state = small.state_dict()
    for name, value in model.state_dict().items():
        if not name.startswith(blocks):
            small_state[name].copy_(value)
    for new, i in zip(small.blocks, cut.blocks, strict=True):
        _cut_block(new, model.blocks[i], heads=cut.columns[i, "attn"], hidden=cut.columns[i, "mlp"])
    return small


def _cut_block(new: Block, old: Block, *, heads: Tensor, hidden: Tensor) -> None:
    for one, other in ((new.norm1, old.norm1), (new.norm2, old.norm2)):
        one.load_state_dict(other.state_dict())
    width = old.attn.proj.in_features
    rows = torch.cat([heads + part * width for part in range(3)])
    new.attn.qkv.weight.copy_(old.attn.qkv.weight[rows])
    if old.attn.qkv.bias is not None:
        new.attn.qkv.bias.copy_(old.attn.qkv.bias[rows])
    for first, theirs in zip(_first_maps(new.mlp), _first_maps(old.mlp), strict=True):
        first.weight.copy_(theirs.weight[hidden])
        first.bias.copy_(theirs.bias[hidden])
    for part, columns in (("attn", heads), ("mlp", hidden)):
        scale, own = (old.ls1, new.ls1) if part == "attn" else (old.ls2, new.ls2)
        last, theirs = last_map(new, part), last_map(old, part)
        last.weight.copy_(scale.gamma[:, None] * theirs.weight[:, columns])
        last.bias.copy_(scale.gamma * theirs.bias)
        own.gamma.fill_(1.0)


def _first_maps(mlp: Mlp | GatedMlp) -> list[nn.Linear]:
    return [mlp.w1, mlp.w2] if isinstance(mlp, GatedMlp) else [mlp.fc1]


@torch.no_grad()
def refit(small: VisionTransformer, model: VisionTransformer, cut: Cut, images: Sequence[Tensor]) -> None:
    """Refit the last map of every branch of `small`, in place.

    Args:
        small: of `cut_model`.
        model: what it was cut from.
        cut: likewise.
        images: batches [B, C, H, W], normalised.
    """
    grids = [model.grid_size(batch) for batch in images]
    ropes = [model.rope_embed(h, w, batch.device) for (h, w), batch in zip(grids, images, strict=True)]
    theirs = [model._embed(batch, None) for batch in images]
    ours = [tokens.clone() for tokens in theirs]
    for gone in range(cut.blocks[0]):
        theirs = [model.blocks[gone](x, rope) for x, rope in zip(theirs, ropes, strict=True)]
    for new, i, end in zip(small.blocks, cut.blocks, (*cut.blocks[1:], model.depth), strict=True):
        middle = [x + _attend(model.blocks[i], x, rope) for x, rope in zip(theirs, ropes, strict=True)]
        theirs = [x + _feed(model.blocks[i], x) for x in middle]
        for gone in range(i + 1, end):
            theirs = [model.blocks[gone](x, rope) for x, rope in zip(theirs, ropes, strict=True)]
        mixed = [_before(new, "attn", x, rope) for x, rope in zip(ours, ropes, strict=True)]
        ours = _fit_last(new, "attn", mixed, ours, middle)
        hidden = [_before(new, "mlp", x, None) for x in ours]
        ours = _fit_last(new, "mlp", hidden, ours, theirs)


def _attend(block: Block, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    return block.ls1(block.attn(block.norm1(x), rope))


def _feed(block: Block, x: Tensor) -> Tensor:
    return block.ls2(block.mlp(block.norm2(x)))


def _before(block: Block, part: str, x: Tensor, rope: tuple[Tensor, Tensor] | None) -> Tensor:
    """What the last map of a branch is given."""
    seen: list[Tensor] = []
    handle = last_map(block, part).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        if rope is not None:
            block.attn(block.norm1(x), rope)
        else:
            block.mlp(block.norm2(x))
    finally:
        handle.remove()
    return seen[0]


def _fit_last(
    block: Block, part: str, inputs: list[Tensor], before: list[Tensor], wanted: list[Tensor]
) -> list[Tensor]:
    """Set the map so that before + map(inputs) is nearest to wanted; returns these sums."""
    last = last_map(block, part)
    missing = [w - b - last(x) for x, b, w in zip(inputs, before, wanted, strict=True)]
    weight, bias = ridge(inputs, missing, penalty=_RIDGE)  # of the correction: it stays small where little is known
    last.weight.add_(weight)
    last.bias.add_(bias)
    return [b + last(x) for x, b in zip(inputs, before, strict=True)]


def ridge(inputs: Sequence[Tensor], outputs: Sequence[Tensor], *, penalty: float) -> tuple[Tensor, Tensor]:
    """The affine map from [..., K] to [..., D] with the least squared error: weight [D, K] and bias [D].

    Args:
        inputs: parts, each [..., K].
        outputs: as many, each [..., D].
        penalty: on the squared weights, times the mean variance of the inputs.
    """
    count = sum(part[..., 0].numel() for part in inputs)
    mean_x, mean_y = (
        _sum([part.flatten(0, -2).double().sum(0) for part in parts]) / count for parts in (inputs, outputs)
    )
    x = [(part.flatten(0, -2) - mean_x).float() for part in inputs]
    y = [(part.flatten(0, -2) - mean_y).float() for part in outputs]
    gram = _sum([(one.T @ one).double() for one in x]) / count
    cross = _sum([(one.T @ two).double() for one, two in zip(x, y, strict=True)]) / count
    gram += penalty * gram.diagonal().mean().clamp_min(1e-12) * torch.eye(len(gram), dtype=gram.dtype)
    weight = torch.linalg.solve(gram, cross).T
    return weight.float(), (mean_y - weight @ mean_x).float()


def _sum(parts: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(parts)).sum(0)
