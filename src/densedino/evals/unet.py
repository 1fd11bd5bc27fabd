"""Owns the supervised baseline: a U-Net of segmentation-models-pytorch, trained end to end on images and masks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from densedino.errors import require
from densedino.images.decoding import read_image
from densedino.weights.catalog import IMAGENET_STATS

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from densedino.evals.datasets import Sample
    from densedino.evals.protocol import Task

__all__ = ["Training", "fit_unet", "unet_labels"]

_MULTIPLE = 32
"""Sides are padded to multiples of it: five halvings."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """How the U-Net is trained; images are small, as it has a few minutes of a CPU."""

    encoder: str = "resnet18"
    steps: int = 400
    batch: int = 8
    crop: int = 160
    """Side of the random crops, in pixels of the resized image."""
    shrink: float = 2.0
    """Images are made smaller by this; outputs are interpolated back to the original pixels."""
    lr: float = 2e-3
    """AdamW's peak, after a twentieth of the steps; then a cosine to 0."""
    weight_decay: float = 1e-2


def fit_unet(task: Task, labels_of: Callable[[int], Tensor], *, training: Training) -> nn.Module:
    """A U-Net from random weights (no other are at hand), by cross-entropy, with flips and random crops."""
    smp = require("segmentation_models_pytorch", extra="dev", purpose="the U-Net baseline")
    torch.manual_seed(task.seed)
    net: nn.Module = smp.Unet(
        training.encoder, encoder_weights=None, classes=len(task.data.classes), decoder_channels=(64, 48, 32, 24, 16)
    ).to(memory_format=torch.channels_last)
    pictures = [_picture(sample, shrink=training.shrink) for sample in task.train]
    labels = [_shrunk(labels_of(i), picture) for i, picture in enumerate(pictures)]
    optimizer = torch.optim.AdamW(net.parameters(), lr=training.lr, weight_decay=training.weight_decay)
    generator = torch.Generator().manual_seed(task.seed)
    void = -100 if task.data.ignore is None else task.data.ignore
    net.train()
    for step in range(training.steps):
        picked = torch.randint(len(pictures), (training.batch,), generator=generator).tolist()
        crops = [_crop(pictures[i], labels[i], side=training.crop, void=void, generator=generator) for i in picked]
        for group in optimizer.param_groups:
            group["lr"] = training.lr * _schedule(step, training.steps)
        found = net(_normalised(torch.stack([crop[0] for crop in crops])))
        loss = F.cross_entropy(found, torch.stack([crop[1] for crop in crops]).long(), ignore_index=void)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval()


@torch.no_grad()
def unet_labels(net: nn.Module, sample: Sample, *, training: Training) -> NDArray[np.int64]:
    """The class of each pixel of a file [H, W]."""
    picture = _picture(sample, shrink=training.shrink)
    height, width = picture.shape[1:]
    padding = (0, -width % _MULTIPLE, 0, -height % _MULTIPLE)
    logits = net(F.pad(_normalised(picture[None]), padding, mode="replicate"))[:, :, :height, :width]
    size = read_image(sample.image).array.shape[:2]
    found: NDArray[np.int64] = F.interpolate(logits, size=size, mode="bilinear")[0].argmax(0).numpy()
    return found


def _picture(sample: Sample, *, shrink: float) -> Tensor:
    """[3, H, W] uint8, made smaller."""
    pixels = read_image(sample.image)
    image = torch.from_numpy(np.ascontiguousarray(pixels.array.astype(np.float32) / pixels.max_value)).permute(2, 0, 1)
    size = [max(1, round(side / shrink)) for side in image.shape[1:]]
    small = F.interpolate(image[None], size=size, mode="bilinear", antialias=True)[0]
    return (small.clamp(0, 1) * 255).round().byte()


def _shrunk(labels: Tensor, picture: Tensor) -> Tensor:
    """Labels on the pixels of a smaller picture: the nearest ones."""
    size = (picture.shape[1], picture.shape[2])
    return F.interpolate(labels[None, None].float(), size=size, mode="nearest-exact")[0, 0].short()


def _crop(
    picture: Tensor, labels: Tensor, *, side: int, void: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """A random square of both, flipped or not; what is beyond the image is black and void."""
    bottom, right = (max(0, side - length) for length in labels.shape)
    if bottom or right:
        picture = F.pad(picture, (0, right, 0, bottom))
        labels = F.pad(labels, (0, right, 0, bottom), value=void)
    top, left, flip = (
        int(torch.randint(n, (), generator=generator)) for n in (*(s - side + 1 for s in labels.shape), 2)
    )
    where = slice(top, top + side), slice(left, left + side)
    one, other = picture[:, where[0], where[1]], labels[where]
    return (one.flip(2), other.flip(1)) if flip else (one, other)


def _normalised(pictures: Tensor) -> Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in IMAGENET_STATS)
    return ((pictures.float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last)


def _schedule(step: int, steps: int) -> float:
    warm = max(1, steps // 20)
    return (step + 1) / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
