"""Owns mask propagation through videos: the first frame's mask carried on by nearest patches; DAVIS's J and F."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from densedino.errors import ImageError, InputError
from densedino.evals.boundary import davis_f, davis_j
from densedino.evals.datasets import Dataset, Sample, sample_of
from densedino.evals.pixel_probe import spread_to_pixels
from densedino.evals.protocol import Protocol, Scores, Task, gather
from densedino.images.containers import IMAGE_SUFFIXES

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import Tensor

    from densedino.evals.metrics import Counts, Sums
    from densedino.evals.tokens import TokenMap

__all__ = ["PROTOCOL", "Settings", "find_davis", "propagate"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """DINO's protocol (arXiv 2104.14294, §4.2.2) with the numbers of DINOv3's."""

    context: int = 7
    """Frames before this one that vote, besides the first."""
    radius: float = 12.0
    """How far a vote may come from, in patches (a circle)."""
    neighbours: int = 5
    temperature: float = 0.2


def find_davis(root: Path) -> Dataset:
    """DAVIS-2016 or 2017 as it is on disk, or `frames/SEQ/*.jpg` with `masks/SEQ/*.png`.

    Masks hold object numbers (2017), or 0 and 255. 2017's validation list is taken where there is one, else 2016's,
    else all sequences.

    Raises:
        InputError: neither layout, or a sequence whose first frame has no mask.
    """
    if (root / "JPEGImages").is_dir():
        size = next((s for s in ("480p", "Full-Resolution") if (root / "JPEGImages" / s).is_dir()), "480p")
        frames, masks, layout = root / "JPEGImages" / size, root / "Annotations" / size, "DAVIS"
    else:
        frames, masks, layout = root / "frames", root / "masks", "frames and masks"
    if not frames.is_dir() or not masks.is_dir():
        raise InputError(f"{str(root)!r} has neither JPEGImages/480p and Annotations/480p nor frames and masks.")
    lists = [root / "ImageSets" / year / "val.txt" for year in ("2017", "2016")]
    listed = next((path for path in lists if path.is_file()), None)
    names = sorted(path.name for path in frames.iterdir() if path.is_dir())
    if listed is not None:
        words = [line.split()[0].strip("/").split("/") for line in listed.read_text().splitlines() if line.strip()]
        names = list(dict.fromkeys(word[-2] if len(word) > 1 else word[0] for word in words))
    samples: list[Sample] = []
    for name in names:
        images = sorted(path for path in (frames / name).glob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        if len(images) < 3:
            raise InputError(f"sequence {str(frames / name)!r} has {len(images)} frames; at least 3 are needed.")
        for image in images:
            mask = (masks / name / image.name).with_suffix(".png")
            samples.append(sample_of(root, image, target=mask if mask.is_file() else None, group=name))
        if samples[-len(images)].target is None:
            raise InputError(f"sequence {name!r} has no mask of its first frame: {masks / name / images[0].stem!s}.png")
    return Dataset(root=root, layout=layout, kind="video", train=(), test=tuple(samples))


def _objects(sample: Sample, *, size: tuple[int, int]) -> NDArray[np.integer]:
    """Object numbers [H, W], 0 for none.

    Raises:
        ImageError: a mask that cannot be read, or of another size than its frame.
    """
    with Image.open(str(sample.target)) as image:
        if image.mode not in ("L", "P", "1"):
            raise ImageError(
                f"the mask {str(sample.target)!r} is in colours ({image.mode}); object numbers are needed."
            )
        mask = np.array(image).astype(np.uint8)
    if mask.shape != size:
        raise ImageError(
            f"the mask {str(sample.target)!r} has {mask.shape[0]}×{mask.shape[1]} pixels (H×W), its frame "
            f"{size[0]}×{size[1]}. Make them one size."
        )
    mask[mask == 255] = 1 if not ((mask > 0) & (mask < 255)).any() else 0  # white is the object, or void among others
    return mask


def propagate(
    maps: list[Tensor], first: Tensor, *, context: int, radius: float, neighbours: int, temperature: float
) -> list[Tensor]:
    """Soft labels of every frame, from those of the first.

    Each patch takes the mean label of its `neighbours` most similar patches among those within `radius` in the first
    frame and the last `context` ones, weighted by a softmax of cosine / temperature.

    Args:
        maps: [h, w, D] of every frame, normalised along D.
        first: labels [h, w, C] of the first frame.
        context: frames before this one that vote, besides the first.
        radius: in patches.
        neighbours: that vote.
        temperature: of the softmax.

    Returns:
        Labels [h, w, C], frame by frame, the first one's included.
    """
    h, w, _ = maps[0].shape
    reach = int(radius)
    before: deque[int] = deque(maxlen=context)
    labels = [first]
    span = range(-reach, reach + 1)
    offsets = [(dy, dx) for dy in span for dx in span if dy * dy + dx * dx <= radius * radius]
    places = torch.arange(h * w).view(h, w)
    y, x = places // w, places % w
    ys = torch.stack([y + dy for dy, _ in offsets], -1)
    xs = torch.stack([x + dx for _, dx in offsets], -1)
    inside = ((ys >= 0) & (ys < h) & (xs >= 0) & (xs < w)).flatten(0, 1)
    near = (ys.clamp(0, h - 1) * w + xs.clamp(0, w - 1)).flatten(0, 1)  # [h * w, offsets]
    for t in range(1, len(maps)):
        queries = maps[t].flatten(0, 1)
        best_cosines, best_labels = [], []
        for source in dict.fromkeys((0, *before)):
            cosines = (queries @ maps[source].flatten(0, 1).T).gather(1, near).masked_fill_(~inside, -2.0)
            top, which = cosines.topk(min(neighbours, cosines.shape[1]))
            best_cosines.append(top)
            best_labels.append(labels[source].flatten(0, 1)[near.gather(1, which)])
        top, which = torch.cat(best_cosines, 1).topk(neighbours)
        voted = torch.cat(best_labels, 1).gather(1, which[:, :, None].expand(-1, -1, first.shape[2]))
        weights = (top / temperature).softmax(1)
        labels.append((weights[:, :, None] * voted).sum(1).view(h, w, -1))
        before.append(t)
    return labels


def _on_grid(objects: NDArray[np.integer], tokens: TokenMap, numbers: list[int]) -> Tensor:
    """The share of background and of each object in every patch: [h, w, 1 + objects]."""
    (h, w), (height, width) = tokens.array.shape[:2], tokens.source_size
    rows = ((np.arange(height) + 0.5) * tokens.input_size[0] / height / tokens.stride).astype(int).clip(0, h - 1)
    cols = ((np.arange(width) + 0.5) * tokens.input_size[1] / width / tokens.stride).astype(int).clip(0, w - 1)
    places = rows[:, None] * w + cols
    count = np.bincount(places.reshape(-1), minlength=h * w)
    shares = [np.bincount(places[objects == n], minlength=h * w) / np.maximum(count, 1) for n in numbers]
    found = torch.from_numpy(np.stack(shares, -1)).float().view(h, w, -1)
    return torch.cat([1 - found.sum(-1, keepdim=True), found], -1)


def evaluate(head: str, task: Task) -> Scores:
    """J and F of every object of every sequence: means over its frames, but the first and the last, as DAVIS has it."""
    sequences: dict[str, list[Sample]] = {}
    for sample in task.data.test:
        sequences.setdefault(sample.group, []).append(sample)
    keys: list[str] = []
    counts: list[Counts] = []
    for name, samples in sequences.items():
        for number, found in _sequence(samples, task).items():
            keys.append(f"{name}/{number}")
            counts.append(found)
    return gather(keys, counts)


def _sequence(samples: list[Sample], task: Task) -> dict[int, Counts]:
    settings: Settings = task.settings
    tokens = [task.stored.map(sample, keep=False) for sample in samples]
    objects = _objects(samples[0], size=tokens[0].source_size)
    numbers = [int(n) for n in np.unique(objects) if n]
    if not numbers:
        raise InputError(f"the first frame's mask {str(samples[0].target)!r} has no object.")
    labels = propagate(
        [F.normalize(one.float(), dim=-1) for one in tokens],
        _on_grid(objects, tokens[0], numbers),
        context=settings.context,
        radius=settings.radius,
        neighbours=settings.neighbours,
        temperature=settings.temperature,
    )
    scores: dict[int, list[tuple[float, float]]] = {number: [] for number in numbers}
    for sample, one, soft in zip(samples[1:-1], tokens[1:-1], labels[1:-1], strict=True):
        if sample.target is None:
            continue
        true = _objects(sample, size=one.source_size)
        found = spread_to_pixels(soft, one).argmax(-1).numpy()
        for place, number in enumerate(numbers, 1):
            pair = found == place, true == number
            scores[number].append((davis_j(*pair), davis_f(*pair)))
    return {
        number: {
            "j": np.float64(np.mean([j for j, _ in of])),
            "f": np.float64(np.mean([f for _, f in of])),
            "j_recall": np.float64(np.mean([j > 0.5 for j, _ in of])),
            "f_recall": np.float64(np.mean([f > 0.5 for _, f in of])),
            "objects": np.int64(1),
        }
        for number, of in scores.items()
    }


def figures(sums: Sums, settings: Settings) -> dict[str, float]:
    """J&F, J and F in percent: means over objects."""
    j, f, jr, fr = (100 * float(sums[name]) / float(sums["objects"]) for name in ("j", "f", "j_recall", "f_recall"))
    return {"j&f": (j + f) / 2, "j": j, "f": f, "j_recall": jr, "f_recall": fr}


PROTOCOL = Protocol(
    name="tracking",
    find=find_davis,
    settings=Settings,
    heads=lambda settings: ("propagation",),
    evaluate=evaluate,
    figures=figures,
    rule=(
        "Labels of patches (the shares of objects in their pixels) are carried on; soft labels are interpolated "
        "bilinearly to the frame's pixels, the largest wins. J and F of frames 2 to the last but one."
    ),
    learns=False,
)
