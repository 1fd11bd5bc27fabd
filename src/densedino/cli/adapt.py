"""Owns `densedino adapt`: options to a configuration, what is said before, during and after, and the layer sweep."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from densedino.cli.options import override, parse_resize

if TYPE_CHECKING:
    from densedino.adapters.adapt import AdaptConfig
    from densedino.adapters.fit import Progress
    from densedino.adapters.sweep import Block

__all__ = ["run"]

_LINE_EVERY = 10.0  # seconds


@dataclass(frozen=True, kw_only=True)
class Options:
    """As they are written on the command line."""

    data: Annotated[Path, tyro.conf.Positional]
    """Images with masks (train trainannot val valannot; images masks; …), with depths, or in folders of classes."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("adapter")
    """The adapter's folder."""
    task: Literal["segmentation", "depth", "classification"] = "segmentation"
    """What is to be told."""
    head: Literal["linear", "bn-linear", "mlp", "knn", "fpn", "upernet", "dpt", "mask-transformer", "vit-adapter"] = (
        "bn-linear"
    )
    """What tells it."""
    tune: Literal["frozen", "lora", "dora", "norm-bias", "full"] = "frozen"
    """What of the backbone is trained with the head, afterwards, on crops."""
    model: str | None = None
    """Weights or an architecture by name, as for extract."""
    weights: str | None = None
    """A checkpoint, as for extract."""
    layers: tuple[int, ...] = ()
    """Blocks that the head sees; -1 is the last."""
    resize: str = "native"
    """native, 512 (short side), or 512x768."""
    classes: int | None = None
    """Of masks; by default the largest label of training, and one more."""
    ignore: int = 255
    """The label of pixels of no class."""
    depth_unit: float = 1.0
    """Metres that 1 means in depth maps: 0.001 for millimetres."""
    most_depth: float = 10.0
    """Metres; what is farther is not learnt."""
    steps: int | None = None
    """Of the last fit: of the head, or of head and backbone together."""
    batch_size: int = 8
    """Images of a step."""
    rank: int = 8
    """Of LoRA and DoRA."""
    fraction: float = 1.0
    """Of the training images, drawn by the seed."""
    seed: int = 0
    """Of the run."""
    features: Path | None = None
    """A store that runs on the same data share."""
    device: str = "auto"
    """auto, cpu, cuda, mps."""
    sweep: bool = False
    """Score every block with a linear map, instead of fitting a head."""
    set: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Any field of the configuration, as in fit.lr=3e-4 or tune.targets=["attn.qkv","mlp.fc1"]; may be repeated."""


def run(options: tyro.conf.OmitArgPrefixes[Options]) -> int:
    """Fit a head, and if asked the backbone, to labelled images of yours.

    A linear map of frozen features: densedino adapt camvid/ --ignore 11 -o camvid-linear

    LoRA on a twentieth of the labels: densedino adapt camvid/ --ignore 11 --tune lora --fraction 0.05 -o camvid-lora

    Which block tells most: densedino adapt camvid/ --ignore 11 --sweep -o camvid-sweep

    The same command again goes on after an interruption. In Python: adapter = dd.load_adapter("camvid-lora")
    """
    config = _configuration(options)
    if options.sweep:
        return _sweep(options, config)
    from densedino.adapters.adapt import adapt

    out = options.out
    result = adapt(
        options.data,
        config=config,
        output=out,
        model=options.model,
        weights=options.weights,
        device=options.device,
        features=options.features,
        say=_note,
        advance=_Lines(),
    )
    before = f" (frozen: {result.frozen:.2f})" if result.frozen is not None else ""
    print(f"{out}: {result.metric} {result.score:.2f}{before} on the validation images, which also chose the step.")
    print(f"{result.trained:,} numbers trained in {result.seconds:,.0f} s; curves in {out / 'report.json'}.")
    print(f"Use it: densedino.load_adapter({str(out)!r})(image). Export it: densedino export {out} --to onnx")
    return 0


def _configuration(options: Options) -> AdaptConfig:
    from densedino.adapters.adapt import AdaptConfig
    from densedino.adapters.heads import HeadConfig
    from densedino.adapters.tasks import Task
    from densedino.adapters.tuning import TuneConfig

    config = AdaptConfig(
        task=Task(
            kind=options.task,
            ignore=options.ignore,
            depth_unit=options.depth_unit,
            most_depth=options.most_depth,
        ),
        head=HeadConfig(kind=options.head, layers=options.layers),
        tune=TuneConfig(kind=options.tune, rank=options.rank, alpha=2.0 * options.rank),
        resize=parse_resize(options.resize),
        classes=options.classes,
        fraction=options.fraction,
        seed=options.seed,
    )
    return override(_with_steps(config, options.steps, options.batch_size), options.set)


def _with_steps(config: AdaptConfig, steps: int | None, batch_size: int) -> AdaptConfig:
    """The last fit gets the steps; both get the batch."""
    last = "fit" if config.tune.kind == "frozen" and config.head.kind != "vit-adapter" else "fit_together"
    fits = {name: replace(getattr(config, name), batch_size=batch_size) for name in ("fit", "fit_together")}
    if steps is not None:
        fits[last] = replace(fits[last], steps=steps, every=min(fits[last].every, max(1, steps // 2)))
    return replace(config, fit=fits["fit"], fit_together=fits["fit_together"])


def _sweep(options: Options, config: AdaptConfig) -> int:
    from densedino.adapters.labels import read_labelled
    from densedino.adapters.sweep import sweep
    from densedino.checkpoint import atomic_path
    from densedino.features.extractor import load

    out = options.out
    labelled = read_labelled(
        options.data, config.task, classes=config.classes, fraction=config.fraction, seed=config.seed
    )
    dino = load(options.model, weights=options.weights, device=options.device, resize=config.size)
    metric = labelled.task.metric

    def say(block: Block) -> None:
        print(f"block {block.layer:>3}   {metric} {block.score:.2f}", flush=True)

    blocks = sweep(dino, labelled, out / "work" / "blocks", advance=say)
    best = (max if labelled.task.higher_is_better else min)(blocks, key=lambda block: block.score)
    with atomic_path(out / "sweep.json") as scratch:
        rows = [{"layer": block.layer, metric: block.score} for block in blocks]
        scratch.write_text(
            json.dumps({"model": dino.card.to_dict(), "blocks": rows}, indent=1) + "\n", encoding="utf-8"
        )
    print(
        f"{out / 'sweep.json'}: block {best.layer} tells most: {metric} {best.score:.2f}. Use it: --layers {best.layer}"
    )
    return 0


class _Lines:
    """A line now and then, with rate and remaining time."""

    def __init__(self) -> None:
        self._said = self._start = time.perf_counter()
        self._first = -1

    def __call__(self, progress: Progress) -> None:
        now = time.perf_counter()
        if self._first < 0 or progress.step <= self._first:
            self._start, self._first = now, progress.step
        if progress.score is None and now - self._said < _LINE_EVERY:
            return
        self._said = now
        taken = progress.step - self._first
        rate = f", {taken / (now - self._start):.2f} steps/s" if taken else ""
        left = (progress.steps - progress.step) * (now - self._start) / taken if taken else 0.0
        score = f", validation {progress.score:.2f}" if progress.score is not None else ""
        ends = f", about {left:,.0f} s left" if left else ""
        _note(f"progress   step {progress.step:,} of {progress.steps:,}, loss {progress.loss:.3f}{score}{rate}{ends}")


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
