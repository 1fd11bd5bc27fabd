"""Owns copy detection: queries against references, all pairs in one ranking; micro average precision."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch.nn.functional as F

from densedino.errors import InputError
from densedino.evals.datasets import Dataset, sample_of
from densedino.evals.labelled import find_images
from densedino.evals.protocol import Protocol, Scores, Task, gather
from densedino.evals.ranking import average_precision

if TYPE_CHECKING:
    from pathlib import Path

    from densedino.evals.metrics import Counts, Sums

__all__ = ["PROTOCOL", "Settings", "find_copies"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The image similarity challenge's metric (arXiv 2106.09672), with scores in steps so that sums can be added."""

    nearest: int = 10
    """References of each query that are proposed."""
    steps: int = 2_000
    """Of the cosine from −1 to 1; pairs within a step count as tied."""


def find_copies(root: Path) -> Dataset:
    """`references/`, `queries/` and a table with a header, `pairs.csv`: query,reference (names without suffix).

    A query may have no reference, or an empty one: then it is a distractor. DISC21's `*_ground_truth.csv` is taken too.

    Raises:
        InputError: a part is missing, or the table names an image that is not there.
    """
    folders = [root / name for name in ("references", "queries")]
    table = next((p for p in (root / "pairs.csv", *sorted(root.glob("*ground_truth.csv"))) if p.is_file()), None)
    if table is None or not all(folder.is_dir() for folder in folders):
        raise InputError(f"{str(root)!r} needs references/, queries/ and pairs.csv (query,reference).")
    references, queries = ({image.stem: sample_of(root, image) for image in find_images(folder)} for folder in folders)
    wanted: dict[str, list[str]] = {}
    with table.open(encoding="utf-8", newline="") as file:
        for row in list(csv.reader(file))[1:]:
            query, reference = [*row, ""][:2]
            if query not in queries or (reference and reference not in references):
                raise InputError(f"{str(table)!r} names {row!r}, which is not among the images.")
            if reference:
                wanted.setdefault(queries[query].key, []).append(references[reference].key)
    return Dataset(
        root=root,
        layout="copies",
        kind="copies",
        train=tuple(references.values()),
        test=tuple(queries.values()),
        relevant={key: (tuple(found), (), ()) for key, found in wanted.items()},
    )


def evaluate(head: str, task: Task) -> Scores:
    """Of every query: how many of its nearest references fall on each step of cosine, rightly and wrongly."""
    settings: Settings = task.settings
    base, queries = (F.normalize(task.stored.vectors(part), dim=1) for part in (task.data.train, task.data.test))
    cosines, places = (queries @ base.T).topk(min(settings.nearest, len(base)))
    steps = ((cosines + 1) / 2 * settings.steps).round().long().clamp(0, settings.steps).numpy()
    keys = [sample.key for sample in task.data.train]
    counts: list[Counts] = []
    for sample, at, which in zip(task.data.test, steps, places.tolist(), strict=True):
        wanted = set(task.data.relevant.get(sample.key, ((), (), ()))[0])
        correct = np.array([keys[i] in wanted for i in which])
        right, wrong = (np.bincount(at[part], minlength=settings.steps + 1) for part in (correct, ~correct))
        precision = average_precision(correct, total=len(wanted)) if wanted else 0.0
        counts.append(
            {
                "right": right.astype(np.int32),
                "wrong": wrong.astype(np.int32),
                "pairs": np.int64(len(wanted)),
                "ap": np.float64(precision),
                "queries": np.int64(bool(wanted)),
            }
        )
    return gather([sample.key for sample in task.data.test], counts)


def figures(sums: Sums, settings: Settings) -> dict[str, float]:
    """Micro average precision, recall at 90 % precision, and the mean over queries, in percent."""
    right, wrong = (np.cumsum(sums[name][::-1].astype(np.float64)) for name in ("right", "wrong"))
    total = float(sums["pairs"])
    if not total:
        return {"uap": float("nan"), "recall@p90": float("nan"), "map": float("nan")}
    proposed = right + wrong
    precision = np.divide(right, proposed, out=np.zeros_like(right), where=proposed > 0)
    micro = float((np.diff(right, prepend=0.0) * precision).sum() / total)
    recall = float((right[precision >= 0.9]).max(initial=0.0) / total)
    return {"uap": 100 * micro, "recall@p90": 100 * recall, "map": 100 * float(sums["ap"]) / float(sums["queries"])}


PROTOCOL = Protocol(
    name="copies",
    find=find_copies,
    settings=Settings,
    heads=lambda settings: ("cosine",),
    evaluate=evaluate,
    figures=figures,
    rule="CLS after the final norm, L2-normalised; a pair's score is its cosine, without score normalisation.",
    resize=224,
    learns=False,
)
