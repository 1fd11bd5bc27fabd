"""Owns a look: what is measured of a frozen backbone at one step, on fixed images and labelled folders.

A look changes nothing: no random numbers, no gradients, no switch of mode; the same backbone gives the same look.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from densedino.distributed import all_reduce
from densedino.errors import DenseDinoError, InputError
from densedino.features.probes import confusion_matrix, fit_linear_probe, knn_vote, mean_iou, patch_shares
from densedino.images.decoding import read_image
from densedino.images.labelled import evenly, read_class_folder, read_mask, read_mask_folder
from densedino.pretrain.meters import cls_patch_cosine, coherence, effective_rank, feature_std, near_and_far

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from torch import nn

    from densedino.pretrain.settings import MonitorConfig
    from densedino.pretrain.sources import Source

__all__ = ["FIXED", "Look", "Observer", "Sizes", "Tokens", "encode", "middle_square", "scale_image"]

FIXED = 16
"""Training images whose patches are kept from look to look."""
BATCH = 16


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How many images a look takes, at most; the same at every look of a run."""

    images: int
    bank: int = 100
    """Of each class."""
    queries: int = 40
    """Of each class."""
    train: int = 100
    """Images with masks."""
    val: int = 50

    def scaled(self, factor: float) -> Sizes:
        """Smaller by `factor`, yet large enough to mean something."""

        def of(count: int, least: int) -> int:
            return max(min(count, least), int(count * factor))

        return Sizes(
            images=of(self.images, FIXED),
            bank=of(self.bank, 10),
            queries=of(self.queries, 5),
            train=of(self.train, 10),
            val=of(self.val, 5),
        )


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """A backbone's tokens of n images of one size."""

    cls: Tensor
    """[n, D] float32."""
    patches: Tensor
    """[n, h, w, D] float32."""


@dataclass(frozen=True, kw_only=True)
class Look:
    """What was seen at one step."""

    measures: dict[str, float]
    patches: Tensor
    """[FIXED, h, w, D] of the fixed images."""
    names: tuple[str, ...]
    """Of the fixed images."""


def scale_image(image: Tensor, *, size: tuple[int, int], max_value: float | None = None) -> Tensor:
    """An image [C, H, W] of any number type, resized: float32 [C, *size] in [0, 1]."""
    white = max_value or {torch.uint8: 255.0, torch.uint16: 65535.0}.get(image.dtype, 1.0)
    x = image[None].float() / white
    return F.interpolate(x, size, mode="bilinear", antialias=True)[0].clamp(0, 1)


def middle_square(image: Tensor, *, side: int, max_value: float | None = None) -> Tensor:
    """The middle of an image [C, H, W] whose short side is scaled to `side`: float32 [C, side, side] in [0, 1]."""
    factor = side / min(image.shape[1:])
    height, width = (max(side, round(n * factor)) for n in image.shape[1:])
    x = scale_image(image, size=(height, width), max_value=max_value)
    top, left = (height - side) // 2, (width - side) // 2
    return x[:, top : top + side, left : left + side]


@torch.no_grad()  # not inference_mode: tables that a module caches meanwhile must remain fit for training
def encode(backbone: nn.Module, pixels: Iterable[Tensor]) -> Iterator[Tokens]:
    """Tokens of batches [b, C, H, W], each on the CPU.

    Raises:
        InputError: the backbone is in training mode, which would make features random.
    """
    if backbone.training:
        raise InputError("a look at a backbone in training mode: call .eval() on the teacher.")
    device = next(backbone.parameters()).device
    for batch in pixels:
        out = backbone(batch.to(device), is_training=True)
        patches = out["x_norm_patchtokens"].float().cpu()
        stride = round((batch.shape[2] * batch.shape[3] / patches.shape[1]) ** 0.5)
        grid = (batch.shape[2] // stride, batch.shape[3] // stride)
        yield Tokens(cls=out["x_norm_clstoken"].float().cpu(), patches=patches.unflatten(1, grid))


def _batches(images: Iterable[Tensor], size: int = BATCH) -> Iterator[Tensor]:
    held: list[Tensor] = []
    for image in images:
        if held and (len(held) == size or held[0].shape != image.shape):
            yield torch.stack(held)
            held = []
        held.append(image)
    if held:
        yield torch.stack(held)


class Observer:
    """Looks at backbones, always at the same images.

    Args:
        config: what to look at.
        sources: the training images; a subset spread evenly over them is taken.
        mean: of the run's images, per channel.
        std: likewise.
        max_value: the pixel value that means 1; None: by type.
        stride: pixels of a patch.
        sizes: of an earlier part of the run; None: found at the first look.

    Raises:
        InputError: a folder without a usable layout, or no training images.
    """

    def __init__(
        self,
        config: MonitorConfig,
        *,
        sources: Sequence[Source],
        mean: Sequence[float],
        std: Sequence[float],
        max_value: float | None = None,
        stride: int = 16,
        sizes: Sizes | None = None,
    ) -> None:
        self.config, self.sources, self.sizes = config, sources, sizes
        self.mean, self.std, self.max_value, self.stride = tuple(mean), tuple(std), max_value, stride
        self.side = max(2, round(config.size / stride)) * stride
        self.classes = read_class_folder(Path(config.knn)) if config.knn else None
        self.masks = read_mask_folder(Path(config.segmentation)) if config.segmentation else None
        self.total = sum(len(source) for source in sources)
        if not self.total:
            raise InputError("there are no training images to look at.")

    def look(self, backbone: nn.Module) -> Look:
        """Measure `backbone`, a module in eval mode that maps pixels to tokens. Every process must call it."""
        sizes = self._agree_on_sizes(backbone)
        fixed = self.fixed()
        patches = [tokens.patches for tokens in self._encode(backbone, (image for _, image in fixed))]
        measures = self._look_at_images(backbone, sizes.images)
        if self.classes is not None:
            measures |= self._look_at_classes(backbone, sizes)
        if self.masks is not None:
            measures |= self._look_at_masks(backbone, sizes)
        return Look(measures=measures, patches=torch.cat(patches), names=tuple(name for name, _ in fixed))

    def fixed(self) -> list[tuple[str, Tensor]]:
        """The fixed images: name, and [C, side, side] in [0, 1]. Training images that cannot be read are left out."""
        chosen = [(str(path), self._square(self._read(path))) for path in self.config.pictures[:FIXED]]
        for i in evenly(self.total, FIXED - len(chosen)):
            chosen += self._readable(i)
        return chosen

    def _read(self, path: Path | str) -> Tensor:
        pixels = read_image(path, in_chans=len(self.mean), max_value=self.max_value)
        return torch.from_numpy(pixels.array).permute(2, 0, 1)

    def _readable(self, index: int) -> list[tuple[str, Tensor]]:
        source = next(s for s in self.sources if (index := index - len(s)) < 0)
        index += len(source)
        try:
            return [(source.name(index), self._square(source.read(index)))]
        except (DenseDinoError, OSError):  # the loader reports it
            return []

    def _square(self, image: Tensor) -> Tensor:
        return middle_square(image, side=self.side, max_value=self.max_value)

    def _whole(self, image: Tensor) -> Tensor:
        """The whole image, its short side scaled to `side` and the long one to the multiple that keeps the shape."""
        factor = self.side / min(image.shape[1:]) / self.stride
        height, width = (max(1, round(n * factor)) * self.stride for n in image.shape[1:])
        return scale_image(image, size=(height, width), max_value=self.max_value)

    def _encode(self, backbone: nn.Module, images: Iterable[Tensor]) -> Iterator[Tokens]:
        mean, std = (torch.tensor(x)[:, None, None] for x in (self.mean, self.std))
        yield from encode(backbone, _batches((x - mean) / std for x in images))

    def _agree_on_sizes(self, backbone: nn.Module) -> Sizes:
        """Time a few images at the first look; the slowest process decides, so that all take the same."""
        if self.sizes is not None:
            return self.sizes
        wanted = Sizes(images=self.config.images)
        classes = len(self.classes.classes) if self.classes else 0
        total = wanted.images + classes * (wanted.bank + wanted.queries)
        total += 2 * (wanted.train + wanted.val) if self.masks else 0  # larger than squares, and a fit to make
        sample = torch.zeros(4, len(self.mean), self.side, self.side)
        for _ in range(2):  # the first warms up
            start = time.perf_counter()
            list(encode(backbone, [sample]))
            each = (time.perf_counter() - start) / len(sample)
        device = next(backbone.parameters()).device
        each = float(all_reduce(torch.tensor(each, device=device), op="max"))
        self.sizes = wanted.scaled(min(1.0, self.config.seconds / (total * each)))
        return self.sizes

    def _look_at_images(self, backbone: nn.Module, count: int) -> dict[str, float]:
        images = (x for i in evenly(self.total, count) for _, x in self._readable(i))
        cls: list[Tensor] = []
        sums = torch.zeros(5, dtype=torch.float64)
        for tokens in self._encode(backbone, images):
            cls.append(tokens.cls)
            parts = [1.0, *near_and_far(tokens.patches), coherence(tokens.patches)]
            parts.append(cls_patch_cosine(tokens.cls, tokens.patches.flatten(1, 2)))
            sums += torch.tensor(parts, dtype=torch.float64) * len(tokens.cls)
        if not cls:
            raise InputError("none of the chosen training images can be read.")
        near, far, coherent, to_cls = (sums[1:] / sums[0]).tolist()
        every = torch.cat(cls)
        return {
            "feature_std": feature_std(every),
            "effective_rank": effective_rank(every),
            "effective_rank_limit": float(min(every.shape)),
            "cls_patch_cosine": to_cls,
            "near_cosine": near,
            "far_cosine": far,
            "coherence": coherent,
        }

    def _look_at_classes(self, backbone: nn.Module, sizes: Sizes) -> dict[str, float]:
        assert self.classes is not None
        sides = []
        for part in self.classes.take(bank=sizes.bank, queries=sizes.queries):
            images = (self._square(self._read(path)) for path, _ in part)
            cls = torch.cat([tokens.cls.double() for tokens in self._encode(backbone, images)])
            sides.append((cls, torch.tensor([label for _, label in part])))
        (bank, labels), (queries, wanted) = sides
        count = len(self.classes.classes)
        weighted = knn_vote(queries, bank, labels, num_classes=count)
        plain = knn_vote(queries, bank, labels, num_classes=count, temperature=None)
        return {
            "knn": float((weighted == wanted).double().mean()),
            "knn_majority": float((plain == wanted).double().mean()),
        }

    def _look_at_masks(self, backbone: nn.Module, sizes: Sizes) -> dict[str, float]:
        assert self.masks is not None
        train, val = self.masks.take(train=sizes.train, val=sizes.val)
        train_labels, val_labels = ([read_mask(mask) for _, mask in part] for part in (train, val))
        ignore = self.config.ignore_label
        count = 1 + max(int(x[x != ignore].max()) for x in (*train_labels, *val_labels) if bool((x != ignore).any()))
        tokens, shares = [], []
        for patches, labels in zip(self._dense(backbone, train), train_labels, strict=True):
            tokens.append(patches.flatten(0, 1))
            grid = (patches.shape[0], patches.shape[1])
            shares.append(patch_shares(labels, grid=grid, num_classes=count, ignore=ignore).flatten(0, 1))
        probe, entropy = fit_linear_probe(torch.cat(tokens), torch.cat(shares))
        confusion = torch.zeros(count, count, dtype=torch.int64)
        for patches, labels in zip(self._dense(backbone, val), val_labels, strict=True):
            size = (labels.shape[0], labels.shape[1])
            confusion += confusion_matrix(probe.predict(patches, size), labels, num_classes=count, ignore=ignore)
        accuracy = float(confusion.diagonal().sum() / confusion.sum())
        return {"miou": mean_iou(confusion), "pixel_accuracy": accuracy, "segmentation_loss": entropy}

    def _dense(self, backbone: nn.Module, pairs: Sequence[tuple[Path, Path]]) -> Iterator[Tensor]:
        """Patches [h, w, D] of each whole image."""
        for tokens in self._encode(backbone, (self._whole(self._read(path)) for path, _ in pairs)):
            yield from tokens.patches
