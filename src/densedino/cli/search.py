"""Owns `densedino search`: what in a store is like an image or a place in one."""

from __future__ import annotations

import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path  # noqa: TC003 (tyro reads it)
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from densedino.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from densedino.features.patch_index import IndexReport
    from densedino.features.queries import Asker, Example, Region
    from densedino.features.search import AnyStore, Found

__all__ = ["run"]


def run(
    store: Annotated[Path, tyro.conf.Positional],
    *,
    query: tuple[str, ...] = (),
    store_row: tuple[str, ...] = (),
    box: tuple[str, ...] = (),
    point: tuple[str, ...] = (),
    negative: tuple[str, ...] = (),
    by: Literal["auto", "images", "patches"] = "auto",
    out: Annotated[tuple[Path, ...], tyro.conf.arg(aliases=["-o"])] = (),
    top: int = 10,
    threshold: float | None = None,
    candidates: int = 1000,
    exact: bool = False,
    weights: str | None = None,
    device: str = "auto",
) -> int:
    """Find what in a store of features is like an image, or like a place in one.

    Images like this one: densedino search features/ --query photo.jpg

    Places like this one, as a table and a sheet of pictures: densedino search features/ --query street.jpg
    --box 120,80,64,48 -o found.csv found.png

    Like the one, unlike the other: densedino search features/ --query street.jpg --point 140,90 --negative 300,40

    Large stores get an index in their folder at the first search; it follows the store from then on.

    Args:
        store: a folder that `densedino extract` made.
        query: image files to search with; a place may stand behind an @: street.jpg@120,80 or @120,80,64,48.
        store_row: images of the store to search with, by key or number, instead of files.
        box: x,y,w,h in pixels of the query; several are several examples of the same thing.
        point: x,y in pixels of the query.
        negative: image@x,y, image@x,y,w,h, an image, or a place in the first query: what is not meant.
        by: whole images (by their CLS token) or patches, grouped into boxes; auto: patches if a place is given.
        out: files to write: .csv, .png (a sheet of pictures); for scenes .geojson.
        top: how many results.
        threshold: the least cosine of a patch that counts; half way from what is usual in the store to 1 if not given.
        candidates: patches that are looked at for each query.
        exact: read all patches instead of using an index.
        weights: the checkpoint that the store was made with, if it is not where it was.
        device: auto, cpu, cuda, mps.
    """
    if top < 1 or candidates < 1:
        raise InputError(f"--top {top} --candidates {candidates}: both must be at least 1.")
    from densedino.features.queries import Asker, examples_of, parse_region
    from densedino.features.search import open_store

    opened = open_store(store)
    _check_outputs(out, opened)
    regions = [parse_region(text) for text in (*box, *point)]
    images = _images(opened, query, store_row, regions)
    positives, negatives = examples_of(images, regions=regions, further=negative, stored=not query)
    asker = Asker(opened, weights=weights, device=device)
    whole = "scene" not in opened.metadata and all(one.region is None for one in (*positives, *negatives))
    if by == "images" or (by == "auto" and whole):
        found = _find_images(asker, positives, negatives, top)
    else:
        found = _find_regions(asker, positives, negatives, _Limits(top, threshold, candidates, exact))
    _say(found)
    for path in out:
        _write(path, found, asker, positives[0])
    return 0 if found else 1


@dataclass(frozen=True)
class _Limits:
    top: int
    threshold: float | None
    candidates: int
    exact: bool


def _images(
    store: AnyStore, query: tuple[str, ...], store_row: tuple[str, ...], regions: list[Region]
) -> tuple[str, ...]:
    """What to search with: files, or keys of the store; for a place in the scene itself, the scene's name."""
    from densedino.features.scenes import SceneStore

    if query and store_row:
        raise InputError("--query and --store-row both say what to search with; give one of them.")
    if query:
        return query
    if isinstance(store, SceneStore):
        if not regions or store_row:
            raise InputError("in the store of a scene, search with --query IMAGE, or --point or --box in the scene.")
        return (store.metadata["scene"]["sources"][0]["path"],)
    if not store_row:
        raise InputError("search for what? Give --query IMAGE, or --store-row KEY of an image of the store.")
    keys = store.keys()
    return tuple(
        keys[int(row)] if row not in keys and row.isdecimal() and int(row) < len(keys) else row for row in store_row
    )


def _find_images(asker: Asker, positives: list[Example], negatives: list[Example], top: int) -> list[Found]:
    import numpy as np

    from densedino.features.search import search_images
    from densedino.features.store import FeatureStore

    if not isinstance(asker.store, FeatureStore):
        raise InputError("the store of a scene has no images to find; leave out --by images.")
    liked, disliked = ([asker.image_vector(one) for one in examples] for examples in (positives, negatives))
    start = time.perf_counter()
    found = search_images(asker.store, np.stack(liked), negatives=np.array(disliked), top=top)
    _note(f"searched   {len(asker.store):,} images in {time.perf_counter() - start:.2f} s")
    return found


def _find_regions(asker: Asker, positives: list[Example], negatives: list[Example], limits: _Limits) -> list[Found]:
    import numpy as np

    from densedino.features.search import SMALL, exact_search, indexed_search, patch_count, search_regions

    liked, disliked = ([asker.region_vector(one) for one in examples] for examples in (positives, negatives))
    count = patch_count(asker.store)
    exact = limits.exact or count <= SMALL
    with _indexing() as (advance, built):
        nearest = exact_search(asker.store) if exact else indexed_search(asker.store, advance=advance, built=built)
    start = time.perf_counter()
    found = search_regions(
        asker.store,
        np.stack(liked),
        nearest=nearest,
        negatives=np.array(disliked),
        without=set().union(*(asker.cells(one) for one in positives)),
        threshold=limits.threshold,
        candidates=limits.candidates,
        top=limits.top,
    )
    how = "all read" if exact else "by the index"
    _note(f"searched   {count:,} patches in {time.perf_counter() - start:.2f} s, {how}")
    return found


@contextmanager
def _indexing() -> Iterator[tuple[Callable[[int], None], Callable[[IndexReport], None]]]:
    """Say what is done to the index, when something is."""
    done, start = 0, time.perf_counter()

    def advance(count: int) -> None:
        nonlocal done
        done += count
        _note(f"indexing   {done:,} patches, {done / (time.perf_counter() - start):,.0f} a second")

    def built(report: IndexReport) -> None:
        _note(
            f"index      of {report.vectors:,} patches built in {report.seconds:.1f} s; recall@10 {report.recall:.3f} "
            f"of exact search, {report.probes} of {report.partitions} parts looked into"
        )

    yield advance, built


def _check_outputs(out: tuple[Path, ...], store: AnyStore) -> None:
    scene = "scene" in store.metadata
    for path in out:
        if path.suffix.lower() not in (".csv", ".png", ".geojson"):
            raise InputError(f"-o {path}: results are written as .csv, .png or .geojson; give a name that ends so.")
        if path.suffix.lower() == ".geojson" and not scene:
            raise InputError(f"-o {path}: photographs have no coordinates on the ground. Give a .csv instead.")


def _say(found: list[Found]) -> None:
    from densedino.features.findings import lines_of

    for line in lines_of(found) if found else ["nothing is like that: try a lower --threshold."]:
        print(line)


def _write(path: Path, found: list[Found], asker: Asker, query: Example) -> None:
    from densedino import __version__
    from densedino.features import findings
    from densedino.features.scenes import SceneStore

    suffix = path.suffix.lower()
    if suffix == ".csv":
        findings.write_csv(found, path)
    elif isinstance(asker.store, SceneStore) and suffix == ".geojson":
        findings.write_geojson(found, asker.store, path)
    else:
        card = asker.store.card
        x, y, width, height = (*(query.region or (0.0, 0.0)), 1.0, 1.0)[:4]
        box = (x, y, width, height) if query.region else None
        findings.draw_found(
            found,
            path,
            query=(findings.read_photo(asker.source(query)), box, query.title),
            heading=f"densedino {__version__} · {asker.store.path.name} · {card.name} ({card.sha256[:8]})",
            alarm="UNTRAINED (random weights): alike in colour and edges, not in meaning" if card.untrained else "",
        )
    print(f"{path}: {len(found)} results")


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
