"""Owns object discovery: a box for the main object of an image, without labels or after one click; CorLoc."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from densedino.errors import InputError, require
from densedino.evals.datasets import Dataset, sample_of
from densedino.evals.labelled import find_images
from densedino.evals.metrics import boxes_iou
from densedino.evals.protocol import Protocol, Scores, Task, gather
from densedino.features.colours import otsu_threshold

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from densedino.evals.metrics import Counts, Sums
    from densedino.evals.tokens import TokenMap

__all__ = ["PROTOCOL", "Settings", "boxes_of_mask", "find_objects", "lost", "one_click", "token_cut"]

Boxes = tuple[tuple[float, float, float, float], ...]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """TokenCut (arXiv 2202.11539) and LOST (arXiv 2109.14279), with their own numbers."""

    heads: tuple[str, ...] = ("TokenCut", "LOST", "one click")
    """Of these."""
    tau: float = 0.2
    """TokenCut: patches with a larger cosine are neighbours."""
    seeds: int = 100
    """LOST: patches with the fewest correlations that may join the seed."""


def find_objects(root: Path) -> Dataset:
    """VOC (`Annotations/*.xml`, the images of ImageSets/Main/trainval.txt), or `images/` with `masks/`.

    A mask's object is what is neither 0 nor 255 (or, if it has 0 and 255 only, what is 255): each label is one object
    with one box.

    Raises:
        InputError: neither, or an image without an object.
    """
    if (root / "Annotations").is_dir() and (root / "JPEGImages").is_dir() and any((root / "Annotations").glob("*.xml")):
        listed = root / "ImageSets" / "Main" / "trainval.txt"
        if listed.is_file():
            paths = [root / "Annotations" / f"{name}.xml" for name in listed.read_text().split()]
        else:
            paths = sorted((root / "Annotations").glob("*.xml"))
        samples = [sample_of(root, root / "JPEGImages" / f"{p.stem}.jpg", boxes=_voc_boxes(p)) for p in paths]
        layout = "VOC"
    elif (root / "images").is_dir() and (root / "masks").is_dir():
        samples = []
        for image in find_images(root / "images"):
            mask = (root / "masks" / image.relative_to(root / "images")).with_suffix(".png")
            if not mask.is_file():
                raise InputError(f"{str(image)!r} has no mask {str(mask)!r}.")
            with Image.open(mask) as opened:
                samples.append(sample_of(root, image, boxes=boxes_of_mask(np.array(opened))))
        layout = "images and masks"
    else:
        raise InputError(f"{str(root)!r} has neither JPEGImages/ and Annotations/ (VOC) nor images/ and masks/.")
    if empty := [sample.key for sample in samples if not sample.boxes]:
        raise InputError(f"{len(empty)} of {len(samples)} images have no object; the first is {empty[0]!r}.")
    return Dataset(root=root, layout=layout, kind="boxes", train=(), test=tuple(samples))


def _voc_boxes(path: Path) -> Boxes:
    """Boxes of all objects; VOC counts pixels from 1, the last one included."""
    boxes = []
    for item in ElementTree.parse(path).getroot().iter("object"):
        box = item.find("bndbox")
        assert box is not None
        x0, y0, x1, y1 = (float(box.findtext(name) or "nan") for name in ("xmin", "ymin", "xmax", "ymax"))
        boxes.append((x0 - 1, y0 - 1, x1, y1))
    return tuple(boxes)


def boxes_of_mask(mask: NDArray[np.integer]) -> Boxes:
    """The box of every object of a mask [H, W]."""
    labels = [int(v) for v in np.unique(mask) if v not in (0, 255)] or ([255] if (mask == 255).any() else [])
    boxes = []
    for label in labels:
        y, x = np.nonzero(mask == label)
        boxes.append((float(x.min()), float(y.min()), float(x.max() + 1), float(y.max() + 1)))
    return tuple(boxes)


def token_cut(patches: torch.Tensor, *, tau: float) -> NDArray[np.bool_]:
    """The object's patches [h, w] by a normalised cut of the graph of patches [h, w, D] (TokenCut)."""
    eigh = require("scipy.linalg", extra="eval", purpose="TokenCut").eigh
    h, w, _ = patches.shape
    tokens = F.normalize(patches.flatten(0, 1).double(), dim=1)
    weights = torch.where(tokens @ tokens.T > tau, 1.0, 1e-5).numpy()
    degrees = weights.sum(1)
    _, vectors = eigh(np.diag(degrees) - weights, np.diag(degrees), subset_by_index=[1, 1])
    second = vectors[:, 0]
    mask = second > second.mean()
    seed = int(np.abs(second).argmax())
    if not mask[seed]:
        mask = ~mask
    return _component(mask.reshape(h, w), seed)


def lost(patches: torch.Tensor, *, seeds: int) -> NDArray[np.bool_]:
    """The object's patches [h, w] from the patch that correlates with the fewest others (LOST)."""
    h, w, _ = patches.shape
    tokens = patches.flatten(0, 1).double()
    correlation = tokens @ tokens.T
    order = (correlation >= 0).sum(1).sort(stable=True).indices
    seed = int(order[0])
    near = order[:seeds]
    friends = near[correlation[near, seed] >= 0]
    mask = (correlation[:, friends].sum(1) >= 0).view(h, w).numpy()
    mask.reshape(-1)[seed] = True
    return _component(mask, seed)


def one_click(patches: torch.Tensor, *, place: tuple[int, int]) -> NDArray[np.bool_]:
    """Patches [h, w] that belong to the clicked one (row, column): more alike than Otsu's threshold, and connected."""
    unit = F.normalize(patches, dim=-1)
    cosines = unit @ unit[place]
    mask = (cosines >= otsu_threshold(cosines.flatten())).numpy()
    mask[place] = True
    return _component(mask, place[0] * patches.shape[1] + place[1])


def _component(mask: NDArray[np.bool_], seed: int) -> NDArray[np.bool_]:
    """What is connected with the seed, by sides."""
    label = require("scipy.ndimage", extra="eval", purpose="object discovery").label
    numbers, _ = label(mask)
    found: NDArray[np.bool_] = numbers == numbers.reshape(-1)[seed]
    return found


def _box(mask: NDArray[np.bool_], tokens: TokenMap) -> NDArray[np.float64]:
    """The box of patches, in pixels of the file."""
    y, x = np.nonzero(mask)
    corners = tokens.to_pixels(np.array([[x.min() - 0.5, y.min() - 0.5], [x.max() + 0.5, y.max() + 0.5]]))
    height, width = tokens.source_size
    return np.clip(corners, 0, [width, height]).reshape(-1)


def evaluate(head: str, task: Task) -> Scores:
    """Of every image: whether the box found has IoU ≥ 0.5 with an object's, and that IoU."""
    counts: list[Counts] = []
    for sample in task.data.test:
        tokens = task.stored.map(sample, keep=False)
        boxes = np.array(sample.boxes)
        if head == "one click":
            overlaps = [_clicked(tokens, box) for box in boxes]
        else:
            patches, settings = tokens.float(), task.settings
            mask = token_cut(patches, tau=settings.tau) if head == "TokenCut" else lost(patches, seeds=settings.seeds)
            overlaps = [float(boxes_iou(_box(mask, tokens), boxes).max())]
        counts.append(_counts(overlaps))
    return gather([sample.key for sample in task.data.test], counts)


def _clicked(tokens: TokenMap, box: NDArray[np.float64]) -> float:
    """IoU with a box of what is found by a click in its middle."""
    x, y = tokens.to_tokens(np.array([[(box[0] + box[2]) / 2, (box[1] + box[3]) / 2]]))[0].round().astype(int)
    h, w = tokens.array.shape[:2]
    mask = one_click(tokens.float(), place=(int(np.clip(y, 0, h - 1)), int(np.clip(x, 0, w - 1))))
    return float(boxes_iou(_box(mask, tokens), box[None])[0])


def _counts(overlaps: Sequence[float]) -> Counts:
    return {
        "found": np.int64(sum(overlap >= 0.5 for overlap in overlaps)),
        "iou": np.float64(sum(overlaps)),
        "asked": np.int64(len(overlaps)),
    }


def figures(sums: Sums, settings: Settings) -> dict[str, float]:
    """CorLoc (for clicks: of all objects) and mean IoU, in percent."""
    asked = float(sums["asked"])
    return {"corloc": 100 * float(sums["found"]) / asked, "box_iou": 100 * float(sums["iou"]) / asked}


PROTOCOL = Protocol(
    name="discovery",
    find=find_objects,
    settings=Settings,
    heads=lambda settings: settings.heads,
    evaluate=evaluate,
    figures=figures,
    rule=(
        "Patches after the final norm (the papers take keys of the last block); the box of the connected patches; a "
        "click is the middle of an object's box."
    ),
    learns=False,
)
