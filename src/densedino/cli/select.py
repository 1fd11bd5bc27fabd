"""Owns `densedino select`: near-duplicates among the images of a store, or few images that stand for all."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 (tyro reads it)
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from densedino.errors import InputError

if TYPE_CHECKING:
    from densedino.features.store import FeatureStore

__all__ = ["run"]


def run(
    store: Annotated[Path, tyro.conf.Positional],
    *,
    duplicates: bool = False,
    diverse: int | None = None,
    by: Literal["k-center", "cluster"] = "k-center",
    threshold: float = 0.95,
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None,
) -> int:
    """Choose images of a store: find near-duplicates, or take few that are as different as possible.

    Groups of near-duplicates, and all images but the copies as a list: densedino select features/ --duplicates
    -o kept.txt

    A hundred images to label first: densedino select features/ --diverse 100 -o label_these.txt

    The list is one path a line, as densedino extract takes it.

    Args:
        store: a folder that `densedino extract` made of images.
        duplicates: print groups of images that are nearly the same; keep the first of each.
        diverse: how many images to take.
        by: k-center (as far apart as possible, odd ones too) or cluster (one for each kind).
        threshold: of --duplicates: the least cosine of CLS tokens, less their mean.
        out: a .txt file for the paths of the images kept or taken.
    """
    if duplicates == (diverse is not None):
        raise InputError("say what to select: --duplicates, or --diverse NUMBER; one of them.")
    if out is not None and out.suffix.lower() != ".txt":
        raise InputError(f"-o {out}: the list of paths is a text file; give a name that ends in .txt.")
    from densedino.features import selection
    from densedino.features.store import FeatureStore

    opened = FeatureStore(store)
    vectors, keys = selection.image_vectors(opened), opened.keys()
    if diverse is not None:
        chosen = selection.diverse(vectors, count=diverse, by=by)
        print("\n".join(keys[row] for row in chosen))
    else:
        groups = selection.duplicates(vectors, threshold=threshold)
        copies = {row for group in groups for row in group[1:]}
        for group in groups:
            print("\n".join(["group:", *(f"  {keys[row]}" for row in group)]))
        print(f"{len(groups):,} groups; {len(copies):,} of {len(keys):,} images repeat the first of their group")
        chosen = [row for row in range(len(keys)) if row not in copies]
    if out is not None:
        _write(opened, chosen, out)
    return 0


def _write(store: FeatureStore, rows: list[int], path: Path) -> None:
    from densedino.checkpoint import atomic_path

    sources = [source for batch in store.batches(columns=["source"]) for source in batch["source"]]
    with atomic_path(path) as work:
        work.write_text("".join(f"{sources[row]}\n" for row in rows), encoding="utf-8")
    print(f"{path}: {len(rows):,} images")
