"""Owns runs of headless distillation: configuration and teachers in, a student that `densedino.load` takes out."""

# ruff: noqa: RUF009 (defaults are frozen)
from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from densedino.config import to_dict
from densedino.errors import InputError
from densedino.models.catalog import ConvNeXtSpec, ViTSpec, model_spec
from densedino.pretrain import Fidelity  # noqa: TC001 (read at run time)
from densedino.pretrain.distill_run import DistillResult, make_student, run_job, write_student
from densedino.pretrain.feature_distill import FeatureState, TeacherConfig, feature_step, fit_heads
from densedino.pretrain.optim import adamw, parameter_groups
from densedino.pretrain.parallel import processes
from densedino.pretrain.settings import DataConfig, SnapshotConfig, StageConfig
from densedino.pretrain.sources import open_sources
from densedino.pretrain.teacher_cache import TeacherCache
from densedino.pretrain.teachers import Teacher, Tokens, open_teacher

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor, nn

    from densedino.pretrain.distill_run import DistillProgress
    from densedino.pretrain.sources import Source
    from densedino.pretrain.step import Batch, StepReport, StepValues

__all__ = ["FeatureDistillConfig", "FeatureJob", "distill_features"]

CACHE_SIZE = 448


@dataclass(frozen=True, kw_only=True)
class FeatureDistillConfig:
    """A whole run. Of the stage its prototypes' settings (losses, masks, temperatures) are not used."""

    model: str | ViTSpec | ConvNeXtSpec
    teachers: tuple[TeacherConfig, ...]
    stage: StageConfig
    """Crops: the student sees the global ones, online teachers the same undistorted, at `gram_size` if that is set."""
    calibration: int = 256
    """Images by which teachers' features are standardised and heads are begun."""
    cache: str | None = None
    """Folder of the cached teachers; None: in the run's."""
    seed: int = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    fidelity: Fidelity = "paper"
    """Which parameters are exempt from weight decay."""
    micro_batch_size: int | None = None
    data: DataConfig = DataConfig()
    snapshots: SnapshotConfig = SnapshotConfig()
    log_every: int = 10

    def __post_init__(self) -> None:
        if not self.teachers:
            raise InputError("no teachers: give TeacherConfig(source=…), one or several.")
        if self.calibration < 2:
            raise InputError(f"calibration is {self.calibration}; features are standardised by 2 images or more.")
        if any(resolution.crops.num_local for resolution in self.stage.resolutions):
            raise InputError("local crops are not used here; set num_local=0 in the crops.")

    @property
    def spec(self) -> ViTSpec | ConvNeXtSpec:
        """The student's row of the table, or the specification given."""
        return model_spec(self.model) if isinstance(self.model, str) else self.model


class FeatureJob:
    """A student, what it is taught, and by whom.

    Args:
        config: of the run.
        backbone: the student: of `densedino.models`, or any module that `as_tokens` reads.
        teachers: as many as the configuration has.
        sources: of pictures; cached teachers are asked about all of them at once.
        cache: folder of the cached teachers' features.
        device: of the student.
        advance: takes (pictures done, of how many) while a cache is filled.
    """

    def __init__(
        self,
        config: FeatureDistillConfig,
        backbone: nn.Module,
        teachers: Sequence[Teacher],
        *,
        sources: Sequence[Source],
        cache: Path,
        device: torch.device | str = "cpu",
        advance: Callable[[int, int], None] | None = None,
    ) -> None:
        if len(teachers) != len(config.teachers):
            raise InputError(f"{len(teachers)} teachers, but the configuration has {len(config.teachers)}.")
        self.config, self.teachers = config, teachers
        self.model = FeatureState(backbone.to(device))
        self._asks = [
            self._cached(teacher, settings, sources, cache, advance)
            if settings.cached
            else self._online(teacher, settings)
            for teacher, settings in zip(teachers, config.teachers, strict=True)
        ]
        self._optimizer: torch.optim.Optimizer | None = None

    @property
    def optimizers(self) -> Mapping[str, torch.optim.Optimizer]:
        """One."""
        assert self._optimizer is not None
        return {"student": self._optimizer}

    def begin(self, batches: Sequence[Batch]) -> list[str]:
        """Standardise the teachers and fit the heads; the same after every restart."""
        told = fit_heads(self.model, batches, self._asks, self.config.teachers)
        settings = self.config.stage.optimizer
        groups = parameter_groups(
            self.model.student.backbone,
            heads=[self.model.student.heads],
            layer_decay=settings.layer_decay,
            patch_embed_lr=settings.patch_embed_lr,
            fidelity=self.config.fidelity,
        )
        self._optimizer = adamw(groups, betas=settings.betas)
        return [f"head {key}: {share:.0%} of the teacher's variance at the start" for key, share in told.items()]

    def take(self, batch: Batch, *, values: StepValues, step: int) -> Mapping[str, StepReport]:
        """One step."""
        config = self.config
        report = feature_step(
            self.model,
            self.optimizers["student"],
            batch.split(config.micro_batch_size),
            self._asks,
            teachers=config.teachers,
            stage=config.stage,
            values=values,
            seed=config.seed,
            step=step,
            precision=config.precision,
        )
        return {"student": report}

    def finish(self, folder: Path, *, pictures: Sequence[tuple[str, int]]) -> list[Path]:
        """Write the moving average."""
        names = ", ".join(teacher.name for teacher in self.teachers)
        backbone = self.model.teacher.backbone
        spec = getattr(backbone, "spec", None)
        path = folder / f"{'student' if spec is None else spec.name}.safetensors"
        how = f"headless distillation from {names}"
        return [write_student(backbone, path, spec=spec, stage=self.config.stage, pictures=pictures, how=how)]

    def _online(self, teacher: Teacher, settings: TeacherConfig) -> Callable[[Batch], Tokens]:
        def ask(batch: Batch) -> Tokens:
            crops = batch.crops
            shown = crops.global_crops if crops.gram_crops is None else crops.gram_crops
            return teacher(_fitted(self._pixels(shown.flatten(0, 1)), teacher.stride, settings.size))

        return ask

    def _cached(
        self,
        teacher: Teacher,
        settings: TeacherConfig,
        sources: Sequence[Source],
        folder: Path,
        advance: Callable[[int, int], None] | None,
    ) -> Callable[[Batch], Tokens]:
        cache = TeacherCache(folder, teacher, size=settings.size or CACHE_SIZE)
        cache.fill(sources, advance=advance)

        def ask(batch: Batch) -> Tokens:
            windows = batch.crops.windows
            assert windows is not None
            stride = self.config.stage.resolutions[0].crops.stride
            grid = [side // stride for side in batch.crops.global_crops.shape[-2:]]
            names = batch.sample_ids * len(windows)
            found = cache.targets(names, windows.flatten(0, 1), grid=(grid[0], grid[1]))
            return Tokens(cls=None, maps=tuple(m.to(batch.masks.device) for m in found.maps))

        return ask

    def _pixels(self, crops: Tensor) -> Tensor:
        """Normalised crops [B, C, H, W] back in 0…1."""
        settings = self.config.stage.resolutions[0].crops
        mean, std = (torch.tensor(v, device=crops.device).view(-1, 1, 1) for v in (settings.mean, settings.std))
        return (crops * std + mean).clamp_(0, 1)


def _fitted(pixels: Tensor, stride: int, size: int | None) -> Tensor:
    """Pixels with a short side of about `size`, and sides that the stride divides."""
    H, W = pixels.shape[-2:]
    scale = 1.0 if size is None else size / min(H, W)
    sides = [max(1, round(side * scale / stride)) * stride for side in (H, W)]
    if sides == [H, W]:
        return pixels
    return torch.nn.functional.interpolate(pixels, size=sides, mode="bicubic", antialias=True).clamp_(0, 1)


def distill_features(
    config: FeatureDistillConfig,
    *,
    output: str | os.PathLike[str],
    sources: Sequence[Source] | None = None,
    teachers: Sequence[Teacher] | None = None,
    backbone: nn.Module | None = None,
    device: str = "auto",
    accept_changes: bool = False,
    say: Callable[[str], None] | None = None,
    advance: Callable[[DistillProgress], None] | None = None,
) -> DistillResult:
    """Distil, or go on where an earlier call stopped; called again with the same arguments after any interruption.

    Args:
        config: the run.
        output: its folder; made if it is not there.
        sources: of pictures, instead of `config.data.sources`.
        teachers: instead of opening those of the configuration: any functions, see `ModuleTeacher`.
        backbone: the student, instead of the configuration's: any module that makes a map of its input.
        device: auto (a GPU if there is one), cpu, cuda, mps.
        accept_changes: go on although the configuration is not that of the run so far.
        say: takes what there is to tell, a line at a time; by default prints it to stderr.
        advance: takes what there is to show of every step.

    Raises:
        InputError: a configuration that contradicts itself, or is not that of the run in `output`.
        TrainingError: too many steps were not finite.
    """
    output = Path(output)
    with processes(device) as where:
        sources = open_sources(config.data, stages=[config.stage]) if sources is None else sources
        asked = teachers or [_open(settings, where) for settings in config.teachers]
        job = FeatureJob(
            config,
            backbone if backbone is not None else make_student(config.spec, stage=config.stage, seed=config.seed),
            asked,
            sources=sources,
            cache=Path(config.cache) if config.cache else output / "teachers",
            device=where,
        )
        return run_job(
            job,
            config=to_dict(config),
            stage=replace(config.stage, masks=replace(config.stage.masks, probability=0.0)),
            sources=sources,
            data=config.data,
            snapshots=config.snapshots,
            seed=config.seed,
            output=output,
            device=where,
            calibration=config.calibration,
            log_every=config.log_every,
            accept_changes=accept_changes,
            say=say,
            advance=advance,
        )


def _open(settings: TeacherConfig, device: torch.device) -> Teacher:
    return open_teacher(
        settings.source, layer=settings.layer, tensor=settings.tensor, stride=settings.stride, device=device
    )
