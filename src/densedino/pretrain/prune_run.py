"""Owns `prune`: from a ViT and images to a smaller one that says nearly the same, with a fidelity report in its file.

Parts are chosen by what they cost on the images, the rest is refitted in closed form, and then learns for some minutes
from the unpruned model. OUT.recovery/ holds that run until the file is there: called again, it goes on.
"""

from __future__ import annotations

import copy
import json
import shutil
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from densedino.checkpoint import atomic_path
from densedino.config import to_dict
from densedino.engines.eager import EagerEngine, choose_device
from densedino.engines.quantized import check_target
from densedino.errors import InputError
from densedino.features.extractor import FeatureExtractor, load
from densedino.features.fidelity import VOID, Fidelity, compare, set_apart
from densedino.images.datasets import list_inputs
from densedino.models.counts import multiplications
from densedino.models.vit import VisionTransformer
from densedino.pretrain.crops import CropConfig
from densedino.pretrain.distill_run import run_job
from densedino.pretrain.feature_distill import TeacherConfig
from densedino.pretrain.feature_run import FeatureDistillConfig, FeatureJob
from densedino.pretrain.pruning import Cut, choose_cut, measure_branches
from densedino.pretrain.refit import cut_model, refit
from densedino.pretrain.schedules import StagedSchedule, constant
from densedino.pretrain.settings import (
    DataConfig,
    OptimizerConfig,
    Resolution,
    SnapshotConfig,
    SourceConfig,
    StageConfig,
)
from densedino.pretrain.sources import open_sources
from densedino.pretrain.teachers import BackboneTeacher
from densedino.weights.convert import write_weights

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from torch import Tensor

    from densedino.pretrain.distill_run import DistillProgress
    from densedino.weights.card import WeightsCard
    from densedino.weights.loading import Weights

__all__ = ["Pruning", "prune"]

_LEAST = 8  # images
_TRIED = 48  # of them, three quarters to fit to and the others to judge by, where numbers of blocks are compared
_WORTH = 1.25  # times the least error: what fewer blocks may cost, since they save all that a block takes
_BATCH = 16
_LR = 5e-5  # the closed form is near: 2e-4 spoilt it in 27 steps, and had not made that good


@dataclass(frozen=True)
class Pruning:
    """What `prune` did."""

    original: FeatureExtractor
    pruned: FeatureExtractor
    fidelity: Fidelity
    closed_form: float
    """Mean cosine of the judged images' patch tokens before recovery."""
    multiplications: float
    """Share that is left, at the size asked."""
    steps: int
    """Of recovery."""


def prune(
    name: str | None = None,
    *,
    weights: Weights = None,
    images: str | os.PathLike[str],
    output: str | os.PathLike[str],
    keep: float = 0.7,
    minutes: float = 10.0,
    size: int = 224,
    most: int = 128,
    labelled: str | os.PathLike[str] | None = None,
    masks: str | os.PathLike[str] | None = None,
    void: int = VOID,
    device: str = "auto",
    say: Callable[[str], None] = lambda _: None,
    advance: Callable[[DistillProgress], None] | None = None,
) -> Pruning | None:
    """Write a smaller ViT, as a file that `dd.load(weights=…)` takes; it says how near it is.

    Args:
        name: of weights or an architecture, as in `dd.load`.
        weights: as in `dd.load`.
        images: a folder, a pattern, a list: pictures like those that will come. The report is on up to 32 of them from
            which nothing is learnt, if there are more than `most`.
        output: a .safetensors file that does not exist yet.
        keep: share of the multiplications at `size`.
        minutes: of recovery; 0 for the closed form alone.
        size: short side in pixels, a multiple of the stride.
        most: images to measure and refit on; recovery takes all but the judged ones.
        labelled: as in `compare`.
        masks: likewise.
        void: likewise.
        device: of recovery.
        say: takes what there is to tell, a line at a time.
        advance: takes what there is to show of every step of recovery.

    Returns:
        None if a signal stopped the recovery: the same call goes on.

    Raises:
        InputError: not a ViT, fewer than 8 images, a share that cannot be kept, an output that cannot be written.
    """
    target = check_target(output)
    if not 0 < keep < 1:
        raise InputError(f"keep {keep:g}: the share of multiplications that is left, above 0 and below 1.")
    paths = [item.path for item in list_inputs([images]).items if not item.is_video]
    if len(paths) < _LEAST:
        raise InputError(f"{len(paths)} images in {images}; at least {_LEAST} are needed, and 100 are better.")
    original = load(name, weights=weights, device="cpu", engine="eager", precision="fp32", resize=size)
    if not isinstance(original.model, VisionTransformer) or original.model.spec.pruned:
        raise InputError(f"{original.card.name} is no ViT of the table; only such are pruned.")
    seen, judged = set_apart(paths, most=most)
    pixels = [original.transform(path).pixels[None] for path in seen]
    small = _closed_form(original, pixels, keep, size, say)
    start = compare(original, _extractor(small, original), judged)
    say(f"closed form  cosine mean {start.tokens.mean:.4f}, before any training")
    learnt = sorted(set(paths) - set(judged)) or seen
    folder = target.with_suffix(".recovery")
    steps = 0
    if minutes > 0:
        recovered = _recover(
            copy.deepcopy(small), original, learnt, folder, minutes, size, choose_device(device), say, advance
        )
        if recovered is None:
            return None
        if _error(recovered[0], original.model, pixels[:_TRIED]) < _error(small, original.model, pixels[:_TRIED]):
            small, steps = recovered
        else:
            say("recovery left out: it came no nearer in that time")
    fidelity = compare(original, _extractor(small, original), judged, labelled=labelled, masks=masks, void=void)
    spec, left = small.spec, multiplications(small.spec, side=size) / multiplications(original.model.spec, side=size)
    card = _card(original.card, spec.name, f"pruned to {left:.2f} of its multiplications on {len(seen)} images", steps)
    write_weights(small.state_dict(), target, card=card, spec=spec, extra={"densedino.fidelity": fidelity.to_json()})
    shutil.rmtree(folder, ignore_errors=True)
    return Pruning(original, load(weights=target, resize=size), fidelity, start.tokens.mean, left, steps)


def _extractor(model: VisionTransformer, like: FeatureExtractor) -> FeatureExtractor:
    engine = EagerEngine(model, device=torch.device("cpu"), precision="fp32")
    return FeatureExtractor(engine, like.transform, replace(like.card, name=model.spec.name))


def _card(card: WeightsCard, name: str, how: str, steps: int) -> WeightsCard:
    taught = f", then {steps} steps of learning from the original" if steps else ""
    note = f"{how}{taught}; from {card.name}, SHA-256 {card.sha256}"
    return replace(
        card, name=f"{card.name}-pruned", model=name, dialect="densedino", dropped=(), notes=(*card.notes, note)
    )


def _closed_form(
    original: FeatureExtractor, images: Sequence[Tensor], keep: float, size: int, say: Callable[[str], None]
) -> VisionTransformer:
    """The best of what drops 0, 1, 2, … whole blocks and cuts the rest in width."""
    model = original.model
    assert isinstance(model, VisionTransformer)
    say(f"measuring    {len(images)} images, forward and back")
    branches = measure_branches(model, images)
    tried = images[: min(_TRIED, len(images))]
    part = max(1, len(tried) // 4)
    found: list[tuple[float, Cut]] = []
    for dropped in range(model.depth):
        try:
            cut = choose_cut(model.spec, branches, keep=keep, side=size, dropped=dropped)
        except InputError:
            if not found:
                raise
            break
        small = cut_model(model, cut)
        refit(small, model, cut, tried[part:] or tried)
        found.append((_error(small, model, tried[:part]), cut))
        say(f"{len(cut.blocks):>4} blocks   cosine mean {1 - found[-1][0]:.4f}")
        if found[-1][0] > 2 * min(error for error, _ in found):
            break
    least = min(error for error, _ in found)
    cut = [cut for error, cut in found if error <= _WORTH * least][-1]
    small = cut_model(model, cut)
    refit(small, model, cut, images)
    return small


@torch.no_grad()
def _error(small: VisionTransformer, model: VisionTransformer, images: Sequence[Tensor]) -> float:
    """1 − mean cosine of patch tokens."""
    cosines = []
    for batch in images:
        ours, theirs = (one.get_intermediate_layers(batch)[0] for one in (small, model))
        assert not isinstance(ours, tuple) and not isinstance(theirs, tuple)
        cosines.append(F.cosine_similarity(ours, theirs, dim=-1).mean())
    return 1 - float(torch.stack(cosines).mean())


def _recover(
    small: VisionTransformer,
    original: FeatureExtractor,
    paths: Sequence[Path],
    folder: Path,
    minutes: float,
    size: int,
    device: torch.device,
    say: Callable[[str], None],
    advance: Callable[[DistillProgress], None] | None,
) -> tuple[VisionTransformer, int] | None:
    """The student's moving average and the steps it took; None if stopped."""
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(folder / "images.txt") as scratch:
        scratch.write_text("\n".join(str(path.absolute()) for path in paths) + "\n", encoding="utf-8")
    steps = _steps_before(folder) or _steps(small, original.model, minutes * 60, size, device)
    config = _configuration(small, original, folder / "images.txt", steps, size)
    teacher = BackboneTeacher(
        original.model.to(device), name=original.card.name, statistics=(original.card.mean, original.card.std)
    )
    sources = open_sources(config.data, stages=[config.stage])
    job = FeatureJob(config, small, [teacher], sources=sources, cache=folder / "teachers", device=device)
    result = run_job(
        job,
        config=to_dict(config),
        stage=replace(config.stage, masks=replace(config.stage.masks, probability=0.0)),
        sources=sources,
        data=config.data,
        snapshots=config.snapshots,
        seed=config.seed,
        output=folder,
        device=device,
        calibration=config.calibration,
        say=say,
        advance=advance,
    )
    original.model.to("cpu")
    backbone = job.model.teacher.backbone
    assert isinstance(backbone, VisionTransformer)
    return (backbone.cpu(), result.steps) if result.weights else None


def _steps_before(folder: Path) -> int | None:
    """Of the recovery that goes on."""
    path = folder / "config.json"
    return int(json.loads(path.read_text(encoding="utf-8"))["stage"]["steps"]) if path.is_file() else None


def _steps(small: VisionTransformer, model: torch.nn.Module, seconds: float, size: int, device: torch.device) -> int:
    """As many as fit in the time, by one that is tried out."""
    small.to(device).train()
    model.to(device)
    pixels = torch.zeros(_BATCH, small.in_chans, size, size, device=device)
    for _ in range(2):  # the first warms up
        begin = time.perf_counter()
        with torch.no_grad():
            model(pixels)
        small(pixels).square().sum().backward()
        took = time.perf_counter() - begin
    small.zero_grad(set_to_none=True)
    small.eval()
    return max(2, int(seconds / (1.5 * took)))  # a third of the steps have crops half as large again


def _configuration(
    small: VisionTransformer, original: FeatureExtractor, images: Path, steps: int, size: int
) -> FeatureDistillConfig:
    """Crops of the images as they are, learning rate up in a tenth of the steps and down to nothing."""
    card, stride = original.card, small.stride
    crops = CropConfig(
        mean=card.mean,
        std=card.std,
        global_size=size,
        num_global=1,
        num_local=0,
        global_scale=(0.25, 1.0),
        jitter_probability=0.0,
        grayscale=0.0,
        solarize=0.0,
        rgb=(0, 1, 2) if card.in_chans == 3 else None,
        stride=stride,
    )
    larger = replace(crops, global_size=round(size * 1.5 / stride) * stride)
    rise = steps // 10
    stage = StageConfig(
        name="recovery",
        steps=steps,
        batch_size=_BATCH,
        resolutions=(Resolution(crops=crops, share=2), Resolution(crops=larger, share=1)),
        optimizer=OptimizerConfig(
            lr=StagedSchedule(start=0.0, peak=_LR, end=1e-6, warmup_steps=rise, cosine_steps=steps - rise),
            lr_scaling="none",
            momentum=constant(0.99 if steps > 200 else 0.9),
            patch_embed_lr=1.0,
        ),
        start="random",
    )
    return FeatureDistillConfig(
        model=small.spec,
        teachers=(TeacherConfig(source=f"SHA-256 {card.sha256}", own_space=True),),
        stage=stage,
        calibration=_BATCH,
        data=DataConfig(sources=(SourceConfig(path=str(images)),)),
        snapshots=SnapshotConfig(every=100),
    )
