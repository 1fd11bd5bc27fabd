"""Owns the keypoint protocol: semantic correspondence, PCK; SPair-71k as it is on disk, or a table of pairs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from densedino.errors import InputError
from densedino.evals.datasets import Dataset, Pair, Sample, sample_of
from densedino.evals.matching import pck_figures, score_pairs
from densedino.evals.protocol import Protocol

if TYPE_CHECKING:
    from pathlib import Path


__all__ = ["PROTOCOL", "Settings", "find_pairs"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """SPair's PCK (arXiv 1908.10543): thresholds as parts of the longer side of the target's box."""

    thresholds: tuple[float, ...] = (0.1, 0.05, 0.15)
    """The first one is the headline."""


def find_pairs(root: Path) -> Dataset:
    """SPair-71k (`PairAnnotation/test/*.json`, `JPEGImages/CATEGORY/*.jpg`), or `pairs.json`.

    `pairs.json` is a list of {"source": "a.jpg", "target": "b.jpg", "source_points": [[x, y], …], "target_points":
    [[x, y], …], "scale": pixels}, paths relative to the folder.

    Raises:
        InputError: neither, an image that is not there, or points that do not pair.
    """
    if (root / "PairAnnotation" / "test").is_dir():
        rows = [_spair(json.loads(path.read_text())) for path in sorted((root / "PairAnnotation/test").glob("*.json"))]
        layout = "SPair-71k"
    elif (root / "pairs.json").is_file():
        rows, layout = json.loads((root / "pairs.json").read_text(encoding="utf-8")), "pairs"
    else:
        raise InputError(f"{str(root)!r} has neither PairAnnotation/test/ (SPair-71k) nor pairs.json.")
    samples: dict[str, Sample] = {}
    pairs = []
    for number, row in enumerate(rows):
        for name in (row["source"], row["target"]):
            if name not in samples:
                if not (root / name).is_file():
                    raise InputError(f"pair {number} of {str(root)!r} names {name!r}, which is not there.")
                samples[name] = sample_of(root, root / name)
        if len(row["source_points"]) != len(row["target_points"]) or not row["source_points"] or not row["scale"] > 0:
            raise InputError(
                f"pair {number} of {str(root)!r} has {len(row['source_points'])} and "
                f"{len(row['target_points'])} points and scale {row['scale']}; as many of each are needed."
            )
        pairs.append(
            Pair(
                key=f"{number:06d}:{row['source']}:{row['target']}",
                source=row["source"],
                target=row["target"],
                source_points=tuple((float(x), float(y)) for x, y in row["source_points"]),
                target_points=tuple((float(x), float(y)) for x, y in row["target_points"]),
                scale=float(row["scale"]),
                group=row.get("group", ""),
            )
        )
    return Dataset(root=root, layout=layout, kind="pairs", train=(), test=tuple(samples.values()), pairs=tuple(pairs))


def _spair(one: dict[str, Any]) -> dict[str, Any]:
    x0, y0, x1, y1 = one["trg_bndbox"]
    folder = f"JPEGImages/{one['category']}"
    return {
        "source": f"{folder}/{one['src_imname']}",
        "target": f"{folder}/{one['trg_imname']}",
        "source_points": one["src_kps"],
        "target_points": one["trg_kps"],
        "scale": max(x1 - x0, y1 - y0),
        "group": one["category"],
    }


PROTOCOL = Protocol(
    name="keypoints",
    find=find_pairs,
    settings=Settings,
    heads=lambda settings: ("nearest patch",),
    evaluate=score_pairs,
    figures=pck_figures,
    rule="The source's feature is interpolated at the point; the target's patch of the largest cosine, its centre.",
    learns=False,
)
