"""Owns `densedino adapt`: options to a configuration, what is said before, during and after, and the layer sweep."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
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


def run(
    data: Annotated[Path, tyro.conf.Positional],
    *,
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("adapter"),
    task: Literal["segmentation", "depth", "classification"] = "segmentation",
    head: Literal[
        "linear", "bn-linear", "mlp", "knn", "fpn", "upernet", "dpt", "mask-transformer", "vit-adapter"
    ] = "bn-linear",
    tune: Literal["frozen", "lora", "dora", "norm-bias", "full"] = "frozen",
    model: str | None = None,
    weights: str | None = None,
    layers: tuple[int, ...] = (),
    resize: str = "native",
    classes: int | None = None,
    ignore: int = 255,
    depth_unit: float = 1.0,
    most_depth: float = 10.0,
    steps: int | None = None,
    batch_size: int = 8,
    rank: int = 8,
    fraction: float = 1.0,
    seed: int = 0,
    features: Path | None = None,
    device: str = "auto",
    sweep: bool = False,
    set: tyro.conf.UseAppendAction[tuple[str, ...]] = (),  # noqa: A002 (the option's name)
) -> int:
    """Fit a head, and if asked the backbone, to labelled images of yours.

    A linear map of frozen features: densedino adapt camvid/ --ignore 11 -o camvid-linear

    LoRA on a twentieth of the labels: densedino adapt camvid/ --ignore 11 --tune lora --fraction 0.05 -o camvid-lora

    Which block tells most: densedino adapt camvid/ --ignore 11 --sweep -o camvid-sweep

    The same command again goes on after an interruption. In Python: adapter = dd.load_adapter("camvid-lora")

    Args:
        data: images with masks (train trainannot val valannot; images masks; …), with depths, or in folders of classes.
        out: the adapter's folder.
        task: what is to be told.
        head: what tells it.
        tune: what of the backbone is trained with the head, afterwards, on crops.
        model: weights or an architecture by name, as for extract.
        weights: a checkpoint, as for extract.
        layers: blocks that the head sees; -1 is the last.
        resize: native, 512 (short side), or 512x768.
        classes: of masks; by default the largest label of training, and one more.
        ignore: the label of pixels of no class.
        depth_unit: metres that 1 means in depth maps: 0.001 for millimetres.
        most_depth: metres; what is farther is not learnt.
        steps: of the last fit: of the head, or of head and backbone together.
        batch_size: images of a step.
        rank: of LoRA and DoRA.
        fraction: of the training images, drawn by the seed.
        seed: of the run.
        features: a store that runs on the same data share.
        device: auto, cpu, cuda, mps.
        sweep: score every block with a linear map, instead of fitting a head.
        set: any field of the configuration, as in fit.lr=3e-4 or tune.targets=["attn.qkv","mlp.fc1"]; may be repeated.
    """
    from densedino.adapters.adapt import AdaptConfig, adapt
    from densedino.adapters.heads import HeadConfig
    from densedino.adapters.tasks import Task
    from densedino.adapters.tuning import TuneConfig

    config = AdaptConfig(
        task=Task(kind=task, ignore=ignore, depth_unit=depth_unit, most_depth=most_depth),
        head=HeadConfig(kind=head, layers=layers),
        tune=TuneConfig(kind=tune, rank=rank, alpha=2.0 * rank),
        resize=parse_resize(resize),
        classes=classes,
        fraction=fraction,
        seed=seed,
    )
    config = override(_with_steps(config, steps, batch_size), set)
    if sweep:
        return _sweep(data, config, out, model=model, weights=weights, device=device)
    lines = _Lines()
    result = adapt(
        data,
        config=config,
        output=out,
        model=model,
        weights=weights,
        device=device,
        features=features,
        say=_note,
        advance=lines,
    )
    before = f" (frozen: {result.frozen:.2f})" if result.frozen is not None else ""
    print(f"{out}: {result.metric} {result.score:.2f}{before} on the validation images, which also chose the step.")
    print(f"{result.trained:,} numbers trained in {result.seconds:,.0f} s; curves in {out / 'report.json'}.")
    print(f"Use it: densedino.load_adapter({str(out)!r})(image). Export it: densedino export {out} --to onnx")
    return 0


def _with_steps(config: AdaptConfig, steps: int | None, batch_size: int) -> AdaptConfig:
    """The last fit gets the steps; both get the batch."""
    last = "fit" if config.tune.kind == "frozen" and config.head.kind != "vit-adapter" else "fit_together"
    fits = {name: replace(getattr(config, name), batch_size=batch_size) for name in ("fit", "fit_together")}
    if steps is not None:
        fits[last] = replace(fits[last], steps=steps, every=min(fits[last].every, max(1, steps // 2)))
    return replace(config, fit=fits["fit"], fit_together=fits["fit_together"])


def _sweep(data: Path, config: AdaptConfig, out: Path, *, model: str | None, weights: str | None, device: str) -> int:
    from densedino.adapters.labels import read_labelled
    from densedino.adapters.sweep import sweep
    from densedino.checkpoint import atomic_path
    from densedino.features.extractor import load

    labelled = read_labelled(data, config.task, classes=config.classes, fraction=config.fraction, seed=config.seed)
    dino = load(model, weights=weights, device=device, resize=config.size)
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
