"""Owns instance retrieval: a data base ranked by cosine for every query; mean average precision."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch.nn.functional as F

from densedino.errors import InputError
from densedino.evals.datasets import Dataset, sample_of
from densedino.evals.labelled import find_images, find_labelled
from densedino.evals.protocol import Protocol, Scores, Task, gather
from densedino.evals.ranking import average_precision, oxford_average_precision, precision_at

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from densedino.evals.metrics import Counts, Sums

__all__ = ["PROTOCOL", "Settings", "find_retrieval"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Cosine of CLS; nothing to set but where precision is read off."""

    at: int = 10


def find_retrieval(root: Path) -> Dataset:
    """Oxford and Paris, or images with classes (queries are `val/`, the data base is `train/`).

    Oxford and Paris: images below `jpg/` or `images/`, and either the text files of the first benchmark in `gt_files/`
    (`NAME_query.txt`, `_good`, `_ok`, `_junk`) or the revisited one as `gnd_*.json` (its `.pkl` is not read: nothing is
    unpickled). Queries are whole images; cut them out beforehand where the benchmark's boxes are wanted.

    Raises:
        InputError: neither.
    """
    pictures = next((root / name for name in ("jpg", "images") if (root / name).is_dir()), None)
    revisited, first = sorted(root.glob("gnd_*.json")), root / "gt_files"
    if pictures is not None and (revisited or first.is_dir()):
        by_name = {image.stem: image for image in find_images(pictures)}
        truth = _revisited(revisited[0]) if revisited else _first(first)
        missing = sorted({name for one in truth.values() for part in one for name in part} - by_name.keys())
        missing += sorted(truth.keys() - by_name.keys())
        if missing:
            raise InputError(
                f"{len(missing)} images that {str(root)!r} speaks of are not there; the first: {missing[0]!r}."
            )
        keys = {name: sample_of(root, image).key for name, image in by_name.items()}
        queries = set(truth)
        base = [image for name, image in by_name.items() if not revisited or name not in queries]
        return Dataset(
            root=root,
            layout="revisited Oxford/Paris" if revisited else "Oxford/Paris",
            kind="retrieval",
            train=tuple(sample_of(root, image) for image in base),
            test=tuple(sample_of(root, by_name[name]) for name in truth),
            relevant={
                keys[name]: tuple(tuple(keys[other] for other in part) for part in one)  # type: ignore[misc]
                for name, one in truth.items()
            },
        )
    if list(root.glob("gnd_*.pkl")):
        raise InputError(
            f"{str(root)!r} has its ground truth as a pickle, which can run anything when it is read; here nothing is "
            "unpickled. Where you trust it, write it as gnd_*.json: imlist, qimlist, gnd with easy, hard, junk."
        )
    return find_labelled(root)


Truth = dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]]


def _revisited(path: Path) -> Truth:
    table = json.loads(path.read_text(encoding="utf-8"))
    names = table["imlist"]
    return {
        query: tuple(tuple(names[i] for i in one[part]) for part in ("easy", "hard", "junk"))  # type: ignore[misc]
        for query, one in zip(table["qimlist"], table["gnd"], strict=True)
    }


def _first(folder: Path) -> Truth:
    truth: Truth = {}
    for path in sorted(folder.glob("*_query.txt")):
        stem = path.name.removesuffix("_query.txt")
        query = path.read_text().split()[0].removeprefix("oxc1_")
        parts = {kind: tuple((folder / f"{stem}_{kind}.txt").read_text().split()) for kind in ("good", "ok", "junk")}
        positive = tuple(dict.fromkeys((*parts["good"], *parts["ok"])))
        before = truth.get(query)
        if before is not None and set(before[0]) != set(positive):
            raise InputError(f"{str(path)!r}: the query {query!r} has two ground truths.")
        truth[query] = (positive, (), parts["junk"])
    return truth


def evaluate(head: str, task: Task) -> Scores:
    """Average precision of every query."""
    base, queries = (F.normalize(task.stored.vectors(part), dim=1) for part in (task.data.train, task.data.test))
    place = {sample.key: i for i, sample in enumerate(task.data.train)}
    of_class: dict[int | None, list[int]] = defaultdict(list)
    for i, sample in enumerate(task.data.train):
        of_class[sample.label].append(i)
    counts: list[Counts] = []
    for sample, query in zip(task.data.test, queries, strict=True):
        ranked = (-(base @ query)).sort(stable=True).indices.numpy()
        if task.data.relevant:
            easy, hard, junk = (np.array([place[key] for key in part], int) for part in task.data.relevant[sample.key])
            counts.append(_benchmark(ranked, easy=easy, hard=hard, junk=junk, at=task.settings.at))
        else:
            positive = np.array(of_class[sample.label], int)
            found = average_precision(np.isin(ranked, positive))
            none = positive[:0]
            counts.append(_sums({"": (found, precision_at(ranked, task.settings.at, positive=positive, junk=none))}))
    return gather([sample.key for sample in task.data.test], counts)


def _benchmark(
    ranked: NDArray[np.int64], *, easy: NDArray[np.int64], hard: NDArray[np.int64], junk: NDArray[np.int64], at: int
) -> Counts:
    """Medium first; easy: hard ones do not count; hard: easy ones do not count (arXiv 1803.11285, §3.3)."""
    cases = {
        "": (np.concatenate([easy, hard]), junk),
        "_easy": (easy, np.concatenate([junk, hard])),
        "_hard": (hard, np.concatenate([junk, easy])),
    }
    return _sums(
        {
            name: (
                oxford_average_precision(ranked, positive=positive, junk=left_out),
                precision_at(ranked, at, positive=positive, junk=left_out),
            )
            for name, (positive, left_out) in cases.items()
        }
    )


def _sums(found: dict[str, tuple[float, float]]) -> Counts:
    """Queries without anything to find do not count."""
    counts: Counts = {}
    for name, (precision, at) in found.items():
        real = not np.isnan(precision)
        counts[f"ap{name}"] = np.float64(precision if real else 0)
        counts[f"at{name}"] = np.float64(at if real else 0)
        counts[f"queries{name}"] = np.int64(real)
    return counts


def figures(sums: Sums, settings: Settings) -> dict[str, float]:
    """Mean average precision in percent, and precision at k."""
    found = {}
    for name in ("", "_easy", "_hard"):
        if f"queries{name}" in sums:
            queries = float(sums[f"queries{name}"])
            found[f"map{name}"] = 100 * float(sums[f"ap{name}"]) / queries if queries else float("nan")
            found[f"p@{settings.at}{name}"] = 100 * float(sums[f"at{name}"]) / queries if queries else float("nan")
    return found


PROTOCOL = Protocol(
    name="retrieval",
    find=find_retrieval,
    settings=Settings,
    heads=lambda settings: ("cosine",),
    evaluate=evaluate,
    figures=figures,
    rule="CLS after the final norm, L2-normalised, ranked by cosine; ties in the order of files.",
    resize=224,
    learns=False,
)
