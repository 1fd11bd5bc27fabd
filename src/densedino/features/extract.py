"""Owns extraction: many inputs in, a store of features out, the same whether it was interrupted or not."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from densedino import __version__
from densedino.errors import InputError, StoreError, UnknownNameError
from densedino.features.layout import FORMAT
from densedino.features.planning import Plan, Settings, make_plan
from densedino.features.quarantine import Entry, Quarantine
from densedino.features.single_files import FileSink
from densedino.features.sinks import LanceSink
from densedino.features.spread import the_share
from densedino.features.work import Work, run_here
from densedino.images.datasets import list_inputs
from densedino.models.vit import block_indices

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping, Sequence

    from densedino.features.extractor import FeatureExtractor
    from densedino.features.planning import Job
    from densedino.features.sinks import Sink
    from densedino.features.spread import Share
    from densedino.features.work import Runner

__all__ = ["Files", "Report", "extract", "store_metadata"]

Files = Literal["lance", "npz", "safetensors"]


@dataclass(frozen=True, kw_only=True)
class Report:
    """What an extraction came to."""

    output: Path
    plan: Plan
    rows: int
    """Images and frames that were computed now."""
    total: int
    """Rows that the store has."""
    shrunk: int
    """Of the rows computed now, those that were made smaller to have no more than `max_tokens` patches."""
    quarantined: tuple[Entry, ...]
    """Inputs that failed now."""
    seconds: float


def store_metadata(dino: FeatureExtractor, *, layers: Sequence[int] = (), every: int = 1) -> dict[str, Any]:
    """What a store says of itself: all that decides its numbers, and `fingerprint`, which is equal if they are."""
    model = dino.model
    text = f"{dino.fingerprint} layers={sorted(layers)} every={every}"
    return {
        "format": FORMAT,
        "densedino": __version__,
        "model": model.spec.name,
        "weights": dino.card.to_dict(),
        "untrained": dino.card.untrained,
        "transform": dino.transform.to_dict(),
        "precision": dino.numerics,
        "stride": model.stride,
        "embed_dim": model.embed_dim,
        "layers": sorted(layers),
        "layer_dims": [getattr(model, "embed_dims", [model.embed_dim] * model.depth)[i] for i in sorted(layers)],
        "every": every,
        "fingerprint": hashlib.sha256(text.encode()).hexdigest(),
    }


def extract(
    dino: FeatureExtractor,
    inputs: Sequence[str | os.PathLike[str]],
    *,
    output: str | os.PathLike[str] = "features",
    files: Files = "lance",
    layers: Sequence[int] = (),
    batch_size: int | None = None,
    every: int = 1,
    limit: int | None = None,
    retry: bool = False,
    runner: Runner | None = None,
    announce: Callable[[Plan], None] = lambda plan: None,
    advance: Callable[[int], None] = lambda count: None,
) -> Report:
    """Compute features of everything in `inputs` that `output` does not have yet.

    A run that was interrupted, even killed, goes on where it stopped when it is started again, and ends with the same
    store. Inputs that cannot be used are listed in `quarantine.jsonl` in `output` and tried again when they change.
    An input whose content has changed is computed again.

    Args:
        dino: of `dd.load`; its transform decides the sizes.
        inputs: files, folders, patterns, text lists, videos (see `images.datasets.list_inputs`).
        output: a folder: a Lance dataset (read it with `dd.FeatureStore`), or one file per image.
        files: "lance", or "npz" or "safetensors" for one file per image.
        layers: blocks whose tokens are kept too; negative ones count from the end.
        batch_size: images of one size that are run at once; as many as suit the device if not given.
        every: of the frames of a video, take each `every`-th.
        limit: only the first so many inputs.
        retry: try those in quarantine again.
        runner: does the work elsewhere, as `RayExtraction` does; here if not given. Under torchrun each rank does its
            share by itself.
        announce: called once, before the work begins.
        advance: called, from several threads, with the number of pictures that were done.

    Raises:
        InputError: nothing to be found in `inputs`, a value that makes no sense, or too little memory for a batch.
        StoreError: `output` is something else, has features of other numbers, or cannot be written.
    """
    numbers = {"batch_size": batch_size, "every": every, "limit": limit}
    blocks = _check(dino, files, alone=runner is None, layers=layers, numbers=numbers)
    listing = list_inputs(inputs)
    items, streaming = listing.items[:limit], dino.engine.name == "stream"
    metadata = store_metadata(dino, layers=blocks, every=every)
    settings = Settings.choose(dino.device, inputs=len(items), batch_size=batch_size, streaming=streaming)

    with the_share() as share:
        if share.rank:
            share.wait()
        sink = _open(Path(output), files, metadata)
        quarantine = Quarantine(sink.path / "quarantine.jsonl")
        if retry and not share.rank:
            quarantine.forget([item.key for item in items])
        plan = make_plan(dino, listing, limit=limit, sink=sink, quarantine=quarantine, settings=settings, layers=blocks)
        if not share.rank:
            announce(plan)
            _take_out(plan, sink, quarantine)
        for _ in range(1 if share.rank else 2):  # one process has made the store; all have planned; now all may begin
            share.wait()
        start = time.perf_counter()
        jobs = _own(plan.jobs, share, inputs=len(items), chunk=settings.segment_images)
        work = Work(dino, sink, quarantine, settings, tuple(blocks), every, metadata, advance)
        outcome = (runner or run_here)(work, jobs, largest_tokens=plan.survey.largest_tokens)
        share.wait()
    total = len(sink) if share.world == 1 and runner is None else len(_open(Path(output), files, metadata))
    return Report(
        output=sink.path,
        plan=plan,
        rows=outcome.rows,
        total=total,
        shrunk=outcome.shrunk,
        quarantined=tuple(outcome.failed),
        seconds=time.perf_counter() - start,
    )


def _take_out(plan: Plan, sink: Sink, quarantine: Quarantine) -> None:
    """What is to be computed again."""
    sink.remove(plan.stale)
    quarantine.forget([job.item.key for job in plan.jobs])


def _own(jobs: Sequence[Job], share: Share, *, inputs: int, chunk: int) -> list[Job]:
    """Those of whole chunks, which are computed together, that are this process's. It depends on the listing alone."""
    own = share.of(-(-inputs // chunk))
    return [job for job in jobs if job.position // chunk in own]


def _check(
    dino: FeatureExtractor, files: str, *, alone: bool, layers: Sequence[int], numbers: Mapping[str, int | None]
) -> list[int]:
    """Refuse what makes no sense before anything is written; return the blocks asked for, each once."""
    if files not in get_args(Files):
        raise UnknownNameError("format", files, get_args(Files))
    if files != "lance" and not alone:
        raise InputError(f"several workers write one store; {files} files are written by one process. Leave one out.")
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise InputError(f"{name} is {value}; it must be at least 1.")
    if dino.model.training:
        raise InputError("the model is in training mode; call dino.model.eval() first.")
    return sorted(set(block_indices(list(layers), dino.model.depth))) if layers else []


def _open(path: Path, files: Files, metadata: dict[str, Any]) -> Sink:
    if path.exists() and not path.is_dir():
        raise StoreError(f"{str(path)!r} is a file. Choose a folder with -o.")
    return LanceSink(path, metadata) if files == "lance" else FileSink(path, files, metadata)
