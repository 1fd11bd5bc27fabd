"""Owns how near two ways to run a model are: tokens side by side, neighbours, pictures, size, speed."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from densedino.errors import InputError
from densedino.features.probes import confusion_matrix, fit_linear_probe, mean_iou, patch_shares
from densedino.images.datasets import list_inputs
from densedino.images.labelled import evenly, read_mask, read_mask_folder

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from PIL import Image
    from torch import Tensor

    from densedino.features.extractor import FeatureExtractor
    from densedino.features.tokens import Features

__all__ = ["Cosines", "Fidelity", "Neighbours", "Segmentation", "compare", "compare_pictures", "set_apart"]

VOID = 255
"""Label that is not counted, where nobody says another one."""
_ROUNDS = 3
_NEIGHBOURS = 5
_TRAIN, _VAL = 128, 64  # images with masks, at most
_JUDGED = 32


def set_apart(paths: Sequence[Path], *, most: int) -> tuple[list[Path], list[Path]]:
    """(images to learn from, up to 32 others to judge on), each evenly over all, which may be sorted by class.

    Where there are no others, it is judged on those learnt from.
    """
    seen = [paths[i] for i in evenly(len(paths), most)]
    others = sorted(set(paths) - set(seen)) or seen
    return seen, [others[i] for i in evenly(len(others), _JUDGED)]


@dataclass(frozen=True)
class Cosines:
    """Of vectors of one way with those of the other."""

    mean: float
    percentile_1: float
    min: float

    @classmethod
    def of(cls, values: Tensor) -> Cosines:
        """Summary of [N]."""
        low = values.kthvalue(1 + len(values) // 100).values
        return cls(values.mean().item(), low.item(), values.min().item())


@dataclass(frozen=True)
class Neighbours:
    """Leave-one-out 5-NN classification by CLS: share that is right, and how often both ways say the same."""

    images: int
    classes: int
    accuracy_a: float
    accuracy_b: float
    same: float


@dataclass(frozen=True)
class Segmentation:
    """A linear probe on frozen patches, fitted to each way by itself: mean intersection over union of held-out images.

    `features.probes.fit_linear_probe`: the same data give the same answer.
    """

    images: int
    """Held out."""
    classes: int
    miou_a: float
    miou_b: float


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """How near B is to A."""

    a: str
    b: str
    images: int
    tokens: Cosines
    """Over all real patches of all images."""
    cls: Cosines
    neighbours: Neighbours | None
    """None without labelled images."""
    segmentation: Segmentation | None = None
    """None without masks."""
    bytes_a: int | None
    """Of the weights as they stand on disk or in memory; None where nobody knows."""
    bytes_b: int | None
    seconds_a: float
    """For one image, of the model alone: the least of three interleaved rounds."""
    seconds_b: float

    @property
    def speed(self) -> float:
        """How many times as fast as A B is."""
        return self.seconds_a / self.seconds_b

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe."""
        return {**asdict(self), "speed": self.speed}

    def to_json(self) -> str:
        """For a file."""
        return json.dumps(self.to_dict(), sort_keys=True)


def compare(
    a: FeatureExtractor,
    b: FeatureExtractor,
    images: Sequence[str | os.PathLike[str]],
    *,
    labelled: str | os.PathLike[str] | None = None,
    masks: str | os.PathLike[str] | None = None,
    void: int = VOID,
) -> Fidelity:
    """Run both on the same images, and compare every real patch.

    Args:
        a: the reference.
        b: the other one, with the same transform.
        images: files, folders, patterns.
        labelled: a folder with a folder of images for each class.
        masks: a folder of images with a map of labels each, as `images.labelled.read_mask_folder` finds them; up to
            128 are learnt from, and up to 64 judged on.
        void: the label that is not counted.

    Raises:
        InputError: no images, the two give tokens of other shapes, or labels of fewer than two classes.
    """
    paths = _paths(images)
    token_cosines, cls_cosines = [], []
    times: tuple[list[float], list[float]] = ([], [])
    for path in paths:
        prepared = a.transform(path)
        one, seconds_a = _timed(a, prepared)
        other, seconds_b = _timed(b, b.transform(path))
        times[0].append(seconds_a)
        times[1].append(seconds_b)
        if one.patches.shape != other.patches.shape:
            raise InputError(
                f"{path}: tokens of shape {tuple(one.patches.shape)} and {tuple(other.patches.shape)} cannot be "
                "compared. Give two ways to run one architecture, with one transform."
            )
        cosine = F.cosine_similarity(one.patches.cpu().double(), other.patches.cpu().double(), dim=-1)
        token_cosines.append(cosine[one.valid.cpu()] if one.valid.any() else cosine.flatten())
        cls_cosines.append(F.cosine_similarity(one.cls.cpu().double(), other.cls.cpu().double(), dim=-1))
    return Fidelity(
        a=_name(a),
        b=_name(b),
        images=len(paths),
        tokens=Cosines.of(torch.cat(token_cosines)),
        cls=Cosines.of(torch.cat(cls_cosines)),
        neighbours=None if labelled is None else _neighbours(a, b, Path(labelled)),
        segmentation=None if masks is None else _segmentation(a, b, Path(masks), void=void),
        bytes_a=_bytes(a),
        bytes_b=_bytes(b),
        seconds_a=sorted(times[0])[len(paths) // 2],
        seconds_b=sorted(times[1])[len(paths) // 2],
    )


def _paths(images: Sequence[str | os.PathLike[str]]) -> list[Path]:
    paths = [item.path for item in list_inputs(images).items if not item.is_video]
    if not paths:
        raise InputError(f"no images in {', '.join(map(str, images))}.")
    return paths


def _name(dino: FeatureExtractor) -> str:
    return f"{dino.card.name}, {dino.engine.name}, {dino.numerics.removesuffix(f' by {dino.engine.name}')}"


def _timed(dino: FeatureExtractor, prepared: Any) -> tuple[Features, float]:
    """Features, and the least time of a few calls."""
    features = dino.run([prepared])
    times = []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        dino.run([prepared])
        if dino.device.type != "cpu":
            torch.accelerator.synchronize(dino.device)
        times.append(time.perf_counter() - start)
    return features, min(times)


def _bytes(dino: FeatureExtractor) -> int | None:
    """Of a file in integers, its size; of a module, its parameters."""
    if any(parameter.is_meta for parameter in dino.model.parameters()):
        path = Path(dino.card.source)
        return path.stat().st_size if path.is_file() else None
    if dino.precision in ("int8", "int4"):  # made without a file
        return None
    return sum(parameter.nbytes for parameter in dino.model.parameters())


def _neighbours(a: FeatureExtractor, b: FeatureExtractor, folder: Path) -> Neighbours:
    classes = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    labelled = [(path, label) for label, part in enumerate(classes) for path in _paths([part])]
    if len(classes) < 2:
        raise InputError(f"{folder}: a labelled folder holds a folder of images for each class, two or more.")
    labels = torch.tensor([label for _, label in labelled])
    said = []
    for dino in (a, b):
        cls = torch.cat([dino.run([dino.transform(path)]).cls.cpu() for path, _ in labelled])
        said.append(_vote(F.normalize(cls, dim=-1), labels, len(classes)))
    by_a, by_b = ((answer == labels).double().mean().item() for answer in said)
    return Neighbours(len(labels), len(classes), by_a, by_b, (said[0] == said[1]).double().mean().item())


def _vote(cls: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Leave-one-out: the class that the nearest few vote for, each by its similarity. [N, D], [N] -> [N]."""
    similarity = cls @ cls.T
    similarity.fill_diagonal_(-math.inf)
    nearest = similarity.topk(min(_NEIGHBOURS, len(cls) - 1), dim=-1)
    votes = torch.zeros(len(cls), classes).scatter_add_(1, labels[nearest.indices], nearest.values.exp())
    return votes.argmax(dim=-1)


def _segmentation(a: FeatureExtractor, b: FeatureExtractor, folder: Path, *, void: int) -> Segmentation:
    train, val = read_mask_folder(folder).take(train=_TRAIN, val=_VAL)
    known = [
        int(labels[labels != void].max())
        for _, mask in (*train, *val)
        if bool(((labels := read_mask(mask)) != void).any())
    ]
    classes = 1 + max(known, default=0)
    found = [_miou(dino, train, val, classes=classes, void=void) for dino in (a, b)]
    return Segmentation(len(val), classes, *found)


def _miou(
    dino: FeatureExtractor,
    train: Sequence[tuple[Path, Path]],
    val: Sequence[tuple[Path, Path]],
    *,
    classes: int,
    void: int,
) -> float:
    tokens, shares = [], []
    for path, mask in train:
        patches, labels = _with_labels(dino, path, mask, void=void)
        grid = (patches.shape[0], patches.shape[1])
        tokens.append(patches.flatten(0, 1))
        shares.append(patch_shares(labels, grid=grid, num_classes=classes, ignore=void).flatten(0, 1))
    probe, _ = fit_linear_probe(torch.cat(tokens), torch.cat(shares))
    confusion = torch.zeros(classes, classes, dtype=torch.int64)
    for path, mask in val:
        patches, labels = _with_labels(dino, path, mask, void=void)
        predicted = probe.predict(patches, (labels.shape[0], labels.shape[1]))
        confusion += confusion_matrix(predicted, labels, num_classes=classes, ignore=void)
    return mean_iou(confusion)


def _with_labels(dino: FeatureExtractor, path: Path, mask: Path, *, void: int) -> tuple[Tensor, Tensor]:
    """Patches [h, w, D], and labels over all of their grid: void where it is padding."""
    features = dino.run([dino.transform(path)])
    labels = read_mask(mask)
    whole = [
        round(side * cells * features.stride / seen)
        for side, cells, seen in zip(labels.shape, features.grid, features.input_sizes[0], strict=True)
    ]
    grown = labels.new_full((max(whole[0], labels.shape[0]), max(whole[1], labels.shape[1])), void)
    grown[: labels.shape[0], : labels.shape[1]] = labels
    return features.patches[0].cpu(), grown


def compare_pictures(
    a: FeatureExtractor, b: FeatureExtractor, images: Sequence[str | os.PathLike[str]], *, most: int = 4
) -> Image.Image:
    """PCA colours of A above those of B, in one basis, for the first few images.

    Raises:
        InputError: no images.
    """
    from PIL import Image

    from densedino.features.pictures import pca_images

    paths = _paths(images)[:most]
    features = [dino.run([dino.transform(path)]) for path in paths for dino in (a, b)]
    drawn = [picture.image for picture in pca_images(features, joint=True, long_side=256, smooth=False)]
    sheet = Image.new("RGB", (256 * len(paths), 512), "white")
    for place, image in enumerate(drawn):
        sheet.paste(image, (256 * (place // 2), 256 * (place % 2)))
    return sheet
