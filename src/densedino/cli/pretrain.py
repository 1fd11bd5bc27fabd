"""Owns `densedino pretrain`: options to a configuration, what is said before, during and after, and the exit status."""

from __future__ import annotations

import json
import sys
import time
from collections import deque
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from densedino.cli.options import override
from densedino.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import torch
    from rich.console import Console

    from densedino.pretrain.settings import RunConfig
    from densedino.pretrain.sources import Source
    from densedino.pretrain.trainer import Progress, Result

__all__ = ["run"]

_LINE_EVERY = 10.0  # seconds, where there is no terminal to draw a bar on
_SIZES = (("small", 30_000), ("medium", 300_000), ("large", sys.maxsize))  # up to so many pictures


def run(
    data: Annotated[tuple[str, ...], tyro.conf.Positional],
    *,
    recipe: str | None = None,
    out: Annotated[str, tyro.conf.arg(aliases=["-o"])] = "run",
    model: str | None = None,
    weights: str | None = None,
    in_chans: int | None = None,
    rgb: tuple[int, int, int] | None = None,
    max_value: float | None = None,
    labelled: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    steps: int | None = None,
    batch_size: int | None = None,
    seed: int | None = None,
    workers: int | None = None,
    precision: Literal["auto", "fp32", "bf16"] = "auto",
    device: str = "auto",
    sharded: bool = False,
    set: tyro.conf.UseAppendAction[tuple[str, ...]] = (),  # noqa: A002 (the option's name)
    plan: bool = False,
    accept_changes: bool = False,
) -> int:
    """Train a backbone on your own images, without labels.

    See first what it would do, and how long it takes: densedino pretrain photos/ --recipe vits16_small --plan

    Run the same command again to go on. On several GPUs: torchrun --nproc-per-node 8 -m densedino pretrain ...

    Args:
        data: folders, patterns, .txt lists, .tar shards, hf://NAME:SPLIT, Lance data sets; several are mixed.
        recipe: by name; by the number of images if not given. A wrong name lists them all.
        out: the run's folder.
        model: an architecture by name, instead of the recipe's.
        weights: start from these: a file, an https:// URL, a hub id, a name of `densedino weights`.
        in_chans: channels of the images, if not 3. Their mean and deviation are measured.
        rgb: which channels are red, green and blue, for colour distortions, as in 3 2 1 (the first is 0).
        max_value: white in files of more than 8 bits, such as 4095; 65535 or 1.0 if not given.
        labelled: a folder of class folders or of images and masks, to measure on while training; may be repeated.
        steps: of all stages together; each stage keeps its share, and its schedules.
        batch_size: images of an optimizer step in the first stage, over all processes; others in proportion.
        seed: of the run.
        workers: processes that read images.
        precision: fp32, bf16, or auto (the recipe's on a GPU, fp32 on the CPU).
        device: auto, cpu, cuda, mps.
        sharded: under torchrun, divide the model over the processes (FSDP2) rather than copy it to each.
        set: any field of the configuration, as in gram.steps=500 or seed=3; may be repeated.
        plan: say what would be done, with estimates of time and memory, and stop.
        accept_changes: go on with a run although its settings are not those that it had.
    """
    if not data:
        raise InputError("no data: densedino pretrain photos/ (folders, patterns, lists, shards, data sets).")

    from densedino.distributed import rank
    from densedino.pretrain.parallel import processes
    from densedino.pretrain.sources import open_source, open_sources

    with processes(device) as where:
        say = _note if rank() == 0 else _nothing
        sources: Sequence[Source] = [open_source(p, in_chans=in_chans or 3, max_value=max_value) for p in data]
        config = _choose(sum(map(len, sources)), recipe=recipe, model=model, weights=weights, say=say)
        config = _vary(config, steps=steps, batch_size=batch_size, seed=seed)
        config = _read_as(config, data, sources, rgb=rgb, max_value=max_value, workers=workers, output=Path(out))
        config = _watch(config, labelled)
        chosen, config = config, override(_with_precision(config, precision, where), set)
        if config.data != chosen.data or config.data.fast_jpeg:
            sources = open_sources(config.data, stages=config.stages)
        config = _prepare(config, sources, where, Path(out), only_plan=plan, say=say)
        return 0 if plan else _train(config, sources, out, device, sharded, accept_changes, say)


def _train(
    config: RunConfig,
    sources: Sequence[Source],
    output: str,
    device: str,
    sharded: bool,
    accept_changes: bool,
    say: Callable[[str], None],
) -> int:
    from densedino.distributed import rank
    from densedino.pretrain.trainer import pretrain

    with _progress() as advance:
        result = pretrain(
            config,
            output=output,
            sources=sources,
            device=device,
            sharded=sharded,
            accept_changes=accept_changes,
            say=say,
            advance=advance,
        )
    if rank() == 0:
        _say_result(result)
    return 0 if result.weights else 130


def _with_precision(config: RunConfig, precision: Literal["auto", "fp32", "bf16"], where: torch.device) -> RunConfig:
    if precision == "auto":
        return replace(config, precision="fp32") if where.type == "cpu" else config
    return replace(config, precision=precision)


def _prepare(
    config: RunConfig,
    sources: Sequence[Source],
    where: torch.device,
    output: Path,
    *,
    only_plan: bool,
    say: Callable[[str], None],
) -> RunConfig:
    """Refuse contradictions, tell the plan, and choose micro-batches that fit the machine."""
    from densedino.distributed import rank, world_size
    from densedino.pretrain.contradictions import validate
    from densedino.pretrain.cost import fitting_micro_batch
    from densedino.pretrain.plan import describe, make_plan

    validate(config, world_size=world_size())
    if config.micro_batch_size is None:
        config = replace(config, micro_batch_size=fitting_micro_batch(config, device=where))
    pictures = [(s.path, len(source)) for s, source in zip(config.data.sources, sources, strict=True)]
    plan = make_plan(config, pictures=pictures, device=where, output=output, measure=only_plan)
    for line in describe(plan):
        (print if only_plan and rank() == 0 else say)(line)
    return config


def _choose(
    pictures: int, *, recipe: str | None, model: str | None, weights: str | None, say: Callable[[str], None]
) -> RunConfig:
    """The recipe that was asked for, or one that suits model, weights and number of pictures."""
    from densedino.models.catalog import model_spec
    from densedino.pretrain.outcome import origin_of
    from densedino.recipes import RECIPES
    from densedino.recipes import recipe as named
    from densedino.recipes.one_machine import going_on

    if recipe is not None:
        config = named(recipe)
        config = config if model is None else replace(config, model=model_spec(model).name)
        if weights is None:
            return config
        return replace(config, stages=(replace(config.stages[0], start=weights), *config.stages[1:]))
    if weights is not None:
        card = origin_of(weights)
        config = going_on(card.model if card else model_spec(model or "vitt16").name, weights)
        say(f"recipe     going on from {weights} (as no --recipe is given)")
        return config
    name = f"{model_spec(model or 'vitt16').name}_{next(name for name, most in _SIZES if pictures <= most)}"
    if name not in RECIPES:
        valid = sorted({known.partition("_")[0] for known in RECIPES})
        raise InputError(f"there is no recipe for {model!r} as it is; give --recipe too, or one of {', '.join(valid)}.")
    say(f"recipe     {name}, {RECIPES[name][1]} (as no --recipe is given, for {pictures:,} pictures)")
    return named(name)


def _vary(config: RunConfig, *, steps: int | None, batch_size: int | None, seed: int | None) -> RunConfig:
    from densedino.pretrain.variants import with_batch_size, with_steps

    if batch_size is not None:
        config = with_batch_size(config, batch_size)
    if steps is not None:
        config = with_steps(config, steps)
    return config if seed is None else replace(config, seed=seed)


def _read_as(
    config: RunConfig,
    data: Sequence[str],
    sources: Sequence[Source],
    *,
    rgb: tuple[int, int, int] | None,
    max_value: float | None,
    workers: int | None,
    output: Path,
) -> RunConfig:
    """The run on these data; where they are not RGB, with statistics of theirs: those of the run, if it goes on."""
    from densedino.pretrain.settings import SourceConfig
    from densedino.pretrain.variants import channel_statistics, with_channels

    paths = tuple(SourceConfig(path=path) for path in data)
    config = replace(config, data=replace(config.data, sources=paths, max_value=max_value, workers=workers))
    channels = sources[0].read(0).shape[0]
    if channels == config.in_chans and rgb is None:
        return config
    before = output / "config.json"
    if before.exists():
        crops = json.loads(before.read_text(encoding="utf-8"))["stages"][0]["resolutions"][0]["crops"]
        mean, std = crops["mean"], crops["std"]
    else:
        mean, std = channel_statistics(sources)
    return with_channels(config, mean=mean, std=std, rgb=rgb)


def _watch(config: RunConfig, labelled: Sequence[str]) -> RunConfig:
    """With the probes that these folders are for."""
    from densedino.images.labelled import read_class_folder, read_mask_folder

    monitor = config.monitor
    for folder in labelled:
        try:
            read_mask_folder(Path(folder))
            monitor = replace(monitor, segmentation=folder)
        except InputError as no_masks:
            try:
                read_class_folder(Path(folder))
                monitor = replace(monitor, knn=folder)
            except InputError as no_classes:
                raise InputError(f"--labelled {folder}: {no_masks} {no_classes}") from no_classes
    return replace(config, monitor=monitor)


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _nothing(_: object) -> None:
    pass


def _say_result(result: Result) -> None:
    trouble = [f"{result.skipped:,} steps were not finite and changed nothing"] if result.skipped else []
    trouble += [f"{result.quarantined:,} pictures could not be read: quarantine.jsonl"] if result.quarantined else []
    if trouble:
        _note("; ".join(trouble))
    if result.weights is None:
        print(f"{result.output}: stopped after {result.steps:,} steps. Run the same command again to go on.")
        return
    print(f"{result.weights}: {result.steps:,} steps done. What it learnt: {result.output / 'report.html'}")
    print(f"Use it: densedino extract photos/ --weights {result.weights}")


@contextmanager
def _progress() -> Iterator[Callable[[Progress], None]]:
    """A function that shows a step."""
    from rich.console import Console

    console = Console(stderr=True)
    bar = _Bar(console) if console.is_terminal else _Lines()
    try:
        yield bar.advance
    finally:
        bar.stop()


class _Bar:
    """A bar over the whole run, with the stage, the loss, the rate and the remaining time."""

    def __init__(self, console: Console) -> None:
        from rich import progress as rich

        self._bar = rich.Progress(
            rich.TextColumn("{task.description}"),
            rich.BarColumn(),
            rich.MofNCompleteColumn(),
            rich.TextColumn("{task.fields[facts]}"),
            rich.TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
            speed_estimate_period=120,
        )
        self._task = self._bar.add_task("", total=None, facts="")
        self._pace = _Pace()

    def advance(self, progress: Progress) -> None:
        if not self._bar.live.is_started:
            self._bar.start()
        rate = self._pace.rate(progress)
        self._bar.update(
            self._task,
            description=progress.stage,
            total=progress.total_steps,
            completed=progress.total,
            facts=f"loss {progress.report.losses['total']:.3f}, {rate:,.1f} images/s",
        )

    def stop(self) -> None:
        self._bar.stop()


class _Lines:
    """A line now and then, for logs."""

    def __init__(self) -> None:
        self._said: float | None = None
        self._pace = _Pace()

    def advance(self, progress: Progress) -> None:
        rate = self._pace.rate(progress)
        now = time.perf_counter()
        self._said = now if self._said is None else self._said
        if now - self._said < _LINE_EVERY and progress.total < progress.total_steps:
            return
        self._said = now
        left = (progress.total_steps - progress.total) * progress.images
        eta = f", about {left / rate:,.0f} s left" if left and rate else ""
        _note(
            f"progress   step {progress.total:,} of {progress.total_steps:,} ({progress.stage}), loss"
            f" {progress.report.losses['total']:.3f}, {rate:,.1f} images/s{eta}"
        )

    def stop(self) -> None:
        pass


class _Pace:
    """Images a second over the last steps."""

    def __init__(self) -> None:
        self._steps: deque[tuple[float, int]] = deque(maxlen=50)

    def rate(self, progress: Progress) -> float:
        self._steps.append((time.perf_counter(), progress.images))
        seconds = self._steps[-1][0] - self._steps[0][0]
        return sum(images for _, images in list(self._steps)[1:]) / seconds if seconds else 0.0
