"""Owns `dd.adapt`: from a folder of labelled images to an adapter that `dd.load_adapter` takes, resumable.

First the head is fitted on features of the frozen backbone, which are extracted once into a store. Where the backbone
is tuned too, both then go on together on random crops, from that head (Kumar et al. 2022, arXiv:2202.10054: a fitted
head keeps tuning from distorting features).
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from densedino.adapters.adapted import DESCRIPTION, Adapter, AdapterSpec, load_adapter, taps_of, write_adapter
from densedino.adapters.batches import Augment, CroppedPictures, StoredTokens, order
from densedino.adapters.fit import FitConfig, Fitted, Progress, first_difference, fit
from densedino.adapters.heads import HeadConfig, KnnHead, build_head, head_layers, needs_pixels
from densedino.adapters.labels import read_labelled, read_truth
from densedino.adapters.shown import draw_examples
from densedino.adapters.tasks import NOT_COUNTED, Meter, Task, answer, task_loss
from densedino.adapters.tuning import TuneConfig, trained_backbone, tune
from densedino.checkpoint import atomic_path
from densedino.config import to_dict
from densedino.errors import InputError
from densedino.features.extract import extract
from densedino.features.extractor import load
from densedino.features.sheet import save_png
from densedino.features.store import FeatureStore

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence

    from torch import Tensor, nn

    from densedino.adapters.labels import Example, Labelled
    from densedino.features.extractor import FeatureExtractor
    from densedino.images.transforms import Resize

__all__ = ["AdaptConfig", "Adapted", "adapt"]

_BANK = 50_000  # tokens of a k-NN head
_LINE_EVERY = 10.0  # seconds


@dataclass(frozen=True, kw_only=True)
class AdaptConfig:
    """All that decides an adapter, besides the data and the backbone's weights."""

    task: Task
    head: HeadConfig = field(default_factory=HeadConfig)
    tune: TuneConfig = field(default_factory=TuneConfig)
    fit: FitConfig = field(default_factory=FitConfig)
    """Of the head, on frozen features."""
    fit_together: FitConfig = field(default_factory=lambda: FitConfig(steps=300, lr=3e-3))
    """Of head and backbone, on crops; also of a head that needs pixels."""
    augment: Augment = field(default_factory=Augment)
    resize: int | tuple[int, int] | None = None
    """As `dd.load`; whole images are classified at 224×224 unless it says otherwise."""
    classes: int | None = None
    """Of masks; by default the largest label of training, and one more."""
    fraction: float = 1.0
    """Of the training examples."""
    seed: int = 0

    @property
    def size(self) -> Resize:
        """The transform's."""
        return (224, 224) if self.resize is None and self.task.kind == "classification" else self.resize


@dataclass(frozen=True, kw_only=True)
class Adapted:
    """What an adaptation came to."""

    output: Path
    metric: str
    score: float
    """Of the validation examples, which also chose the step."""
    frozen: float | None
    """The same of the head on the frozen backbone, where the backbone was tuned after."""
    trained: int
    """Numbers that were trained."""
    seconds: float

    def load(self) -> Adapter:
        """The adapter, on the device that is best here."""
        return load_adapter(self.output)


def adapt(
    data: str | os.PathLike[str],
    *,
    config: AdaptConfig,
    output: str | os.PathLike[str],
    model: str | None = None,
    weights: str | None = None,
    device: str = "auto",
    features: str | os.PathLike[str] | None = None,
    say: Callable[[str], None] = lambda line: None,
    advance: Callable[[Progress], None] = lambda progress: None,
) -> Adapted:
    """Fit a head, and if asked the backbone, to the labels of a folder; a killed run goes on when called again.

    Args:
        data: images with masks, with depth maps, or in folders of classes: see docs/adapt.md.
        config: all that decides the result.
        output: the adapter's folder. Its `work` holds features and checkpoints, and may be deleted in the end.
        model: as `dd.load`.
        weights: as `dd.load`.
        device: as `dd.load`.
        features: a store to keep features in, in place of `output/work/features`: other runs on the same data, with
            other heads or seeds, take them from there.
        say: called with a line now and then.
        advance: called after each step.

    Raises:
        InputError: data or settings that cannot be used; the message names the file.
        WeightsError: see `dd.load`.
        TrainingError: the loss is not finite.
    """
    start = time.perf_counter()
    folder = Path(output)
    labelled = read_labelled(
        Path(data),
        config.task,
        classes=config.classes,
        fraction=config.fraction,
        seed=config.seed,
        advance=_Count(say, "labels"),
    )
    say(_about(labelled))
    engine = "auto" if config.tune.kind == "frozen" and config.head.kind != "vit-adapter" else "eager"
    precision = "auto" if engine == "auto" else "fp32"
    dino = load(model, weights=weights, device=device, engine=engine, precision=precision, resize=config.size)
    dino.model.requires_grad_(requires_grad=False)
    work = _Work(dino, labelled, replace(config, task=labelled.task), folder, say=say, advance=advance)
    _check_same(folder, work)
    on_features = work.on_features(Path(features) if features else folder / "work" / "features")
    fitted = work.on_pictures() if on_features is None or config.tune.kind != "frozen" else on_features
    frozen = on_features if on_features is not fitted else None
    trained = sum(p.numel() for p in (*work.head.parameters(), *trained_backbone(dino.model).values()))
    before = frozen.score if frozen else None
    score = {"metric": labelled.task.metric, "value": fitted.score, "step": fitted.best_step, "frozen": before}
    fits = {"head": on_features, "together": fitted if fitted is not on_features else None}
    report = _report(work, labelled, score, fits, data=str(data), trained=trained)
    with atomic_path(folder / "report.json") as scratch:
        scratch.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if not (folder / DESCRIPTION).exists():
        adapter = Adapter(dino, work.head, work.spec)
        if labelled.task.kind != "classification" and dino.transform.in_chans == 3:
            heading = (
                f"{labelled.task.metric} {fitted.score:.2f}: {config.head.kind}, {config.tune.kind} {dino.card.name}"
            )
            save_png(draw_examples(adapter, labelled.val, heading=heading), folder / "examples.png", facts={})
        write_adapter(folder, adapter, score=score)
    return Adapted(
        output=folder,
        metric=labelled.task.metric,
        score=fitted.score,
        frozen=before,
        trained=trained,
        seconds=time.perf_counter() - start,
    )


def _check_same(folder: Path, work: _Work) -> None:
    """Refuse a folder with an adapter of other settings, or on other weights."""
    if not (folder / DESCRIPTION).exists() or not (folder / "report.json").exists():
        return
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    before = {"weights": report["backbone"]["sha256"], "train": report["train"], **report["config"]}
    train = [example.image.as_posix() for example in work.labelled.train]
    now = {"weights": work.dino.card.sha256, "train": train, **to_dict(work.config)}
    if before != json.loads(json.dumps(now)):
        raise InputError(
            f"{folder} holds an adapter with other settings: {first_difference(before, now)}. Give another folder."
        )


def _about(labelled: Labelled) -> str:
    task = labelled.task
    classes = f", {len(task.classes)} classes" if task.classes else ""
    return f"{task.kind}: {len(labelled.train):,} images to train with, {len(labelled.val):,} to validate{classes}"


def _report(
    work: _Work,
    labelled: Labelled,
    score: dict[str, Any],
    fits: dict[str, Fitted | None],
    *,
    data: str,
    trained: int,
) -> dict[str, Any]:
    return {
        "data": data,
        "train": [example.image.as_posix() for example in labelled.train],
        "val": [example.image.as_posix() for example in labelled.val],
        "config": to_dict(work.config),
        "backbone": work.dino.card.to_dict(),
        "score": score,
        "trained_parameters": trained,
        "history": {name: list(fitted.history) for name, fitted in fits.items() if fitted is not None},
    }


class _Count:
    """Says now and then how many are done, and how long the rest will take."""

    def __init__(self, say: Callable[[str], None], what: str, *, total: int | None = None) -> None:
        self.say, self.what, self.total, self.done = say, what, total, 0
        self.start = self.said = time.perf_counter()

    def __call__(self, count: int) -> None:
        self.done += count
        now = time.perf_counter()
        if now - self.said >= _LINE_EVERY:
            self.said, rate = now, self.done / (now - self.start)
            left = f" of {self.total:,}, about {(self.total - self.done) / rate:,.0f} s left" if self.total else ""
            self.say(f"progress   {self.done:,} {self.what}{left}, {rate:,.1f} a second")


class _Work:
    """One adaptation: the head, the backbone, and the two ways of fitting them."""

    def __init__(
        self,
        dino: FeatureExtractor,
        labelled: Labelled,
        config: AdaptConfig,
        folder: Path,
        *,
        say: Callable[[str], None],
        advance: Callable[[Progress], None],
    ) -> None:
        self.dino, self.labelled, self.config, self.folder = dino, labelled, config, folder
        self.say, self.advance = say, advance
        self.task = labelled.task
        self.layers = head_layers(config.head, dino.model.depth)
        self.head = build_head(config.head, dino.model, self.task.purpose, seed=config.seed).to(dino.device)
        self.spec = AdapterSpec(task=self.task, head=config.head, layers=self.layers, tune=config.tune)
        if isinstance(self.head, KnnHead) and config.tune.kind != "frozen":
            raise InputError("a k-NN head has nothing to be trained; take another head, or --tune frozen.")

    def _identity(self) -> dict[str, Any]:
        examples = [e.image.as_posix() for e in self.labelled.train]
        return {"config": to_dict(self.config), "backbone": self.dino.card.sha256, "train": examples}

    def _examples(self, step: int, batch_size: int) -> list[Example]:
        train = self.labelled.train
        return [train[i] for i in order(step, batch_size, len(train), seed=self.config.seed)]

    def on_features(self, store: Path) -> Fitted | None:
        """Fit the head on stored features; None for a head that looks at pixels."""
        if needs_pixels(self.head):
            return None
        pictures = [example.image for example in (*self.labelled.train, *self.labelled.val)]
        inner = [layer for layer in self.layers if layer != self.dino.model.depth - 1]
        self.say(f"features   of {len(pictures):,} images, in {store}")
        report = extract(
            self.dino, pictures, output=store, layers=inner, advance=_Count(self.say, "images", total=len(pictures))
        )
        if report.quarantined or report.plan.held:
            bad = report.quarantined[0] if report.quarantined else None
            raise InputError(
                f"{bad.key}: {bad.reason}" if bad else f"some images were unusable before: {store}/quarantine.jsonl"
            )
        tokens = StoredTokens(FeatureStore(store), self.task, self.layers, depth=self.dino.model.depth)
        device = self.dino.device

        def logits_of(example: Example) -> tuple[Tensor, Any, tuple[int, int]]:
            taps, geometry, source = tokens.taps(example)
            return self.head([_to(tap, device) for tap in taps]), geometry, source

        def validate() -> float:
            return self._score(logits_of)

        if isinstance(self.head, KnnHead):
            self.head.fill(*self._bank(tokens))
            return Fitted(steps=0, best_step=0, score=validate(), history=())

        def loss_at(step: int) -> Tensor:
            examples = self._examples(step, self.config.fit.batch_size)
            taps, targets = tokens.batch(examples, seed=self.config.seed, step=step)
            return task_loss(self.task, self.head.train()([_to(tap, device) for tap in taps]), targets.to(device))

        return self._fit({}, [], loss_at, validate, self.config.fit, name="head")

    def on_pictures(self) -> Fitted:
        """Fit the head, and the backbone as far as it is tuned, on crops of pictures."""
        model, config = self.dino.model, self.config
        groups = tune(model, config.tune, seed=config.seed)
        pictures = CroppedPictures(self.dino.transform, self.task, config.augment)
        adapter = Adapter(self.dino, self.head, self.spec)

        def logits_of(example: Example) -> tuple[Tensor, Any, tuple[int, int]]:
            prepared = self.dino.transform(example.image)
            source = prepared.source_size
            return adapter.logits(prepared.pixels[None]), self.dino.transform.geometry(*source), source

        def loss_at(step: int) -> Tensor:
            examples = self._examples(step, config.fit_together.batch_size)
            pixels, targets = pictures.batch(examples, seed=config.seed, step=step)
            pixels = pixels.to(self.dino.device)
            with torch.set_grad_enabled(bool(groups)):
                taps = taps_of(model.train(), pixels, self.layers)
            return task_loss(self.task, self.head.train()(taps, pixels), targets.to(self.dino.device))

        def validate() -> float:
            model.eval()
            return self._score(logits_of)

        backbone = {f"backbone.{name}": p for name, p in trained_backbone(model).items()}
        fitted = self._fit(backbone, groups, loss_at, validate, config.fit_together, name="together")
        model.eval()
        return fitted

    def _fit(
        self,
        backbone: dict[str, Any],
        groups: Sequence[dict[str, Any]],
        loss_at: Callable[[int], Tensor],
        validate: Callable[[], float],
        config: FitConfig,
        *,
        name: str,
    ) -> Fitted:
        count = sum(p.numel() for p in (*self.head.parameters(), *backbone.values()))
        self.say(f"fitting    {count:,} numbers, {config.steps:,} steps of {config.batch_size} images ({name})")
        heads = {f"head.{key}": tensor for key, tensor in (*self.head.named_parameters(), *self.head.named_buffers())}
        fitted = fit(
            {**heads, **backbone},
            [*_groups(self.head), *groups],
            loss_at=loss_at,
            validate=validate,
            higher_is_better=self.task.higher_is_better,
            config=config,
            state=self.folder / "work" / f"{name}.safetensors",
            identity=self._identity(),
            advance=self.advance,
        )
        self.head.eval()
        self.say(f"{self.task.metric:<10} {fitted.score:.2f} at step {fitted.best_step} ({name})")
        return fitted

    @torch.no_grad()
    def _score(self, logits_of: Callable[[Example], tuple[Tensor, Any, tuple[int, int]]]) -> float:
        self.head.eval()
        meter = Meter(self.task)
        for example in self.labelled.val:
            logits, geometry, source = logits_of(example)
            told = answer(self.task, logits.cpu(), geometry, source, stride=self.dino.transform.stride)
            meter.add(told, read_truth(self.task, example))
        return meter.score

    def _bank(self, tokens: StoredTokens) -> tuple[Tensor, Tensor]:
        """Labelled tokens for a k-NN head, evenly taken: of patches the class of most of its pixels."""
        from densedino.adapters.heads import pooled

        if self.task.kind == "depth":
            raise InputError("a k-NN head tells classes, not depth; take another head.")
        features, labels = [], []
        for i, example in enumerate(self.labelled.train):
            (taps, targets) = tokens.batch([example], seed=self.config.seed, step=i)
            if self.task.kind == "classification":
                features.append(pooled(taps)[:, :, 0, 0])
                labels.append(targets)
                continue
            patches = taps[0].patches[0]
            cells = targets.shape[1] // patches.shape[0]
            blocks = targets[0].unfold(0, cells, cells).unfold(1, cells, cells).flatten(2).mode(-1).values
            counted = blocks != NOT_COUNTED
            features.append(patches[counted])
            labels.append(blocks[counted])
        bank, classes = torch.cat(features), torch.cat(labels)
        places = torch.linspace(0, len(bank) - 1, min(len(bank), _BANK)).long()
        return bank[places].to(self.dino.device), classes[places].to(self.dino.device)


def _groups(head: nn.Module) -> list[dict[str, Any]]:
    """The head's parameters; those of one dimension are not decayed."""
    parameters = [p for p in head.parameters() if p.requires_grad]
    flat = [p for p in parameters if p.ndim < 2]
    return [
        {"params": [p for p in parameters if p.ndim > 1]},
        *([{"params": flat, "wd_multiplier": 0.0}] if flat else []),
    ]


def _to(tap: Any, device: torch.device) -> Any:
    return replace(tap, patches=tap.patches.to(device), cls=tap.cls.to(device), registers=tap.registers.to(device))
