"""Owns what a data set is to an evaluation: samples in two splits, subsets of them, and a manifest with hashes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image

from densedino.errors import ImageError, InputError
from densedino.images.datasets import sha256_file

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

__all__ = ["Dataset", "Pair", "Sample", "few", "limited", "manifest", "read_labels", "sample_of"]

Kind = Literal["labels", "masks", "depth", "video", "retrieval", "copies", "boxes", "pairs"]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One image with what is known of it."""

    key: str
    """Its path within the data set, with forward slashes."""
    image: Path
    label: int | None = None
    """Number of its class."""
    target: Path | None = None
    """Its mask or depth map."""
    group: str = ""
    """Its sequence, category or copy."""
    boxes: tuple[tuple[float, float, float, float], ...] = ()
    """Objects (x0, y0, x1, y1) in pixels, x1 and y1 exclusive."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two images of which points of one are known in the other."""

    key: str
    source: str
    """Key of the sample."""
    target: str
    source_points: tuple[tuple[float, float], ...]
    """(x, y) in pixels from the top left corner."""
    target_points: tuple[tuple[float, float], ...]
    scale: float
    """What thresholds are a part of, in pixels of the target: the longer side of the object's box, or of the image."""
    group: str = ""


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Samples to learn from, and samples to be judged on."""

    root: Path
    layout: str
    """Whose conventions the folder follows."""
    kind: Kind
    train: tuple[Sample, ...]
    """Or what is searched, in retrieval."""
    test: tuple[Sample, ...]
    """Or the queries."""
    classes: tuple[str, ...] = ()
    ignore: int | None = None
    """The label that means void, after `remap`."""
    remap: tuple[int, ...] = ()
    """For labels that are stored as other numbers: what each becomes."""
    depth_scale: float = 1.0
    """Metres per unit of a depth file."""
    relevant: Mapping[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = field(default_factory=dict)
    """Of each query: keys that are easy to find, keys that are hard to find, and keys that do not count."""
    pairs: tuple[Pair, ...] = ()

    @property
    def samples(self) -> tuple[Sample, ...]:
        """All, each once."""
        return tuple({sample.key: sample for sample in (*self.train, *self.test)}.values())


def sample_of(
    root: Path,
    image: Path,
    *,
    label: int | None = None,
    target: Path | None = None,
    group: str = "",
    boxes: tuple[tuple[float, float, float, float], ...] = (),
) -> Sample:
    """A sample with its key; see `Sample`."""
    key = image.relative_to(root).as_posix()
    return Sample(key=key, image=image, label=label, target=target, group=group, boxes=boxes)


def limited(data: Dataset, limit: int | None) -> Dataset:
    """At most `limit` images of each split, spread evenly over its order (so that every class is there).

    Raises:
        InputError: the limit is below 2.
    """
    if limit is None:
        return data
    if limit < 2:
        raise InputError(f"limit is {limit}; it must be at least 2.")

    def evenly(samples: Sequence[Sample]) -> tuple[Sample, ...]:
        if len(samples) <= limit:
            return tuple(samples)
        return tuple(samples[i * len(samples) // limit] for i in range(limit))

    if data.kind == "video":  # a limit in the middle of a sequence: the first frames of each
        kept: dict[str, list[Sample]] = {}
        for sample in data.test:
            kept.setdefault(sample.group, []).append(sample)
        return replace(data, test=tuple(one for frames in kept.values() for one in frames[:limit]))
    if data.kind == "pairs":
        pairs = tuple(data.pairs[i * len(data.pairs) // limit] for i in range(min(limit, len(data.pairs))))
        named = {key for pair in pairs for key in (pair.source, pair.target)}
        return replace(data, pairs=pairs, test=tuple(sample for sample in data.test if sample.key in named))
    if data.relevant:
        return replace(data, test=evenly(data.test))  # what is searched stays whole, or there is nothing to find
    return replace(data, train=evenly(data.train), test=evenly(data.test))


def few(samples: Sequence[Sample], share: float, *, seed: int) -> tuple[Sample, ...]:
    """That share of the samples, drawn by `seed`: of every class by itself where there are labels, at least one.

    Raises:
        InputError: a share that is not above 0 and at most 1.
    """
    if not 0 < share <= 1:
        raise InputError(f"share is {share}; give a part of the training data: 0.01, 0.05, 0.1, or 1 for all.")
    if share == 1:
        return tuple(samples)
    groups: dict[int | None, list[int]] = {}
    for i, sample in enumerate(samples):
        groups.setdefault(sample.label, []).append(i)
    rng = np.random.default_rng([seed, 2001])
    chosen: list[int] = []
    for _, members in sorted(groups.items(), key=lambda group: -1 if group[0] is None else group[0]):
        count = max(1, round(share * len(members)))
        chosen += [members[i] for i in rng.permutation(len(members))[:count]]
    return tuple(samples[i] for i in sorted(chosen))


def manifest(data: Dataset) -> list[dict[str, Any]]:
    """One row per file that is used: split, key, SHA-256, label; masks have rows of their own."""
    rows: list[dict[str, Any]] = []
    for split, samples in (("train", data.train), ("test", data.test)):
        for sample in samples:
            row: dict[str, Any] = {"split": split, "key": sample.key, "sha256": sha256_file(sample.image)}
            if sample.label is not None:
                row["class"] = data.classes[sample.label]
            if sample.target is not None:
                row["target"] = sample.target.relative_to(data.root).as_posix()
                row["target_sha256"] = sha256_file(sample.target)
            rows.append(row)
    return rows


def read_labels(sample: Sample, data: Dataset, *, size: tuple[int, int] | None = None) -> NDArray[np.integer]:
    """The label map of a sample [H, W], of its own size, with labels from 0 and `data.ignore` for void.

    Args:
        sample: with a mask.
        data: whose it is.
        size: (H, W) that the image has.

    Raises:
        ImageError: no mask, one that cannot be read, in colours, of another size, or with labels that are no class.
    """
    path = sample.target
    if path is None or not path.is_file():
        raise ImageError(f"{str(sample.image)!r} has no mask ({path}). Add it, or take the image out.")
    try:
        with Image.open(path) as image:
            if image.mode not in ("L", "P", "I", "I;16", "1"):
                raise ImageError(
                    f"the mask {str(path)!r} is in colours ({image.mode}); it must hold one class number per pixel "
                    "(8- or 16-bit grey, or palette)."
                )
            labels = np.array(image)
    except OSError as error:
        raise ImageError(f"the mask {str(path)!r} cannot be read ({error}).") from error
    labels = labels.astype(np.int64) if labels.dtype not in (np.uint8, np.uint16) else labels
    if size is not None and labels.shape != size:
        raise ImageError(
            f"the mask {str(path)!r} has {labels.shape[0]}×{labels.shape[1]} pixels (H×W), its image "
            f"{str(sample.image)!r} {size[0]}×{size[1]}. Metrics are of original pixels: make them one size."
        )
    if data.remap:
        table = np.asarray(data.remap)
        if int(labels.max()) >= len(table) or int(labels.min()) < 0:
            raise ImageError(f"the mask {str(path)!r} has label {int(labels.max())}; valid are 0 to {len(table) - 1}.")
        labels = table[labels]
    _check_labels(labels, path, data)
    return labels


def _check_labels(labels: NDArray[np.integer], path: Path, data: Dataset) -> None:
    found = np.unique(labels)
    wrong = [int(v) for v in found if not (0 <= v < len(data.classes)) and v != data.ignore]
    if wrong:
        void = "" if data.ignore is None else f", {data.ignore} for void"
        raise ImageError(
            f"the mask {str(path)!r} has labels {wrong[:5]}, which are no class: valid are 0 to "
            f"{len(data.classes) - 1}{void}. Mend it, or say what the labels mean in classes.txt (a name a line)."
        )
