"""Owns the settings of a run: what a recipe returns, strict, nested and frozen; each class refuses what cannot be."""

# ruff: noqa: RUF009 (defaults are frozen)
# No `from __future__ import annotations` here: densedino.config reads the annotations at run time.
from dataclasses import dataclass, replace
from typing import Any, Literal

from densedino.errors import InputError, UnknownNameError
from densedino.models.catalog import MODELS, ConvNeXtSpec, ViTSpec, model_spec
from densedino.models.rope import RopeAugment
from densedino.pretrain import Fidelity
from densedino.pretrain.crops import CropConfig
from densedino.pretrain.schedules import LrScaling, Schedule, constant

__all__ = [
    "DataConfig",
    "GramConfig",
    "HeadConfig",
    "LossConfig",
    "MaskConfig",
    "MonitorConfig",
    "OptimizerConfig",
    "Resolution",
    "RunConfig",
    "SnapshotConfig",
    "SourceConfig",
    "StageConfig",
]

FOREVER = 2**62


def _within(owner: object, low: float, high: float, *names: str) -> None:
    """Refuse fields of `owner` that are not numbers in [low, high]; None is left alone."""
    for name in names:
        value: Any = getattr(owner, name)
        if value is not None and not low <= value <= high:  # NaN fails too
            span = f"at least {low:g}" if high >= FOREVER else f"{low:g} to {high:g}"
            raise InputError(f"{name} is {value}; valid: {span}. Set {type(owner).__name__}.{name} to such a number.")


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """A projection head (`densedino.pretrain.projection`)."""

    hidden_dim: int = 2048
    bottleneck_dim: int = 256
    num_prototypes: int = 65536
    num_layers: int = 3

    def __post_init__(self) -> None:
        _within(self, 1, FOREVER, "hidden_dim", "bottleneck_dim", "num_layers")
        _within(self, 2, FOREVER, "num_prototypes")


@dataclass(frozen=True, kw_only=True)
class MaskConfig:
    """Which patches of the global crops the student does not see (`densedino.pretrain.masking`)."""

    probability: float = 0.5
    """Share of the global crops that are masked."""
    ratio: tuple[float, float] = (0.1, 0.5)
    """Masked share of a masked crop: an even ladder that ends at the upper number."""
    circular_shift: bool = False

    def __post_init__(self) -> None:
        _within(self, 0, 1, "probability")
        if not 0 <= self.ratio[0] <= self.ratio[1] <= 1:
            raise InputError(f"mask ratio is {self.ratio}; valid: two rising shares between 0 and 1, as (0.1, 0.5).")


@dataclass(frozen=True, kw_only=True)
class GramConfig:
    """Gram anchoring (DINOv3 §4): hold the student's patch similarities to those of an earlier teacher."""

    weight: Schedule = constant(2.0)
    normalized: bool = True
    img_level: bool = True
    """One similarity matrix for each image; otherwise one for all patches of a micro-batch."""
    remove_neg: bool = False
    remove_only_teacher_neg: bool = False
    tokens_used: Literal["all", "masked", "unmasked"] = "all"
    source: Literal["checkpoint", "ema"] = "checkpoint"
    """"checkpoint": a frozen backbone, refreshed from the EMA teacher by the schedule below. "ema": the EMA teacher
    itself, at every step; then there are neither Gram crops nor refreshments."""
    checkpoint: str | None = None
    """The frozen backbone's weights: what `densedino.weights.loading.load_weights` takes; None: the teacher with which
    the stage starts."""
    first_update: int | None = None
    """Step of the stage before which the EMA teacher is copied for the first time; None: never."""
    update_every: int | None = None
    """Steps between that and further copies; None: no further ones."""
    max_updates: int | None = None
    """Most copies, the first included; None: no limit."""

    def __post_init__(self) -> None:
        _within(self, 0, FOREVER, "first_update")
        _within(self, 1, FOREVER, "update_every", "max_updates")
        if self.remove_neg and self.remove_only_teacher_neg:
            raise InputError("remove_neg and remove_only_teacher_neg exclude each other; set one of them to False.")
        if self.tokens_used != "all" and self.img_level:
            raise InputError(
                f"tokens_used={self.tokens_used!r} leaves each image another number of tokens, but img_level asks for"
                " one matrix an image. Set img_level=False or tokens_used='all'."
            )
        updates = (self.first_update, self.update_every, self.max_updates)
        if self.source == "ema" and (self.checkpoint is not None or updates != (None, None, None)):
            raise InputError(
                "source='ema' takes the EMA teacher of every step: checkpoint, first_update, update_every and"
                f" max_updates do nothing there; got {self.checkpoint!r}, {updates}. Leave them None, or set"
                " source='checkpoint'."
            )
        if self.first_update is None and updates != (None, None, None):
            raise InputError(
                f"update_every={self.update_every} and max_updates={self.max_updates} do nothing without first_update."
                " Set first_update to the step of the first copy."
            )


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights and options of the losses (DINOv3 §3.2, §4.2)."""

    dino_weight: float = 1.0
    local_weight: Schedule = constant(1.0)
    """Further factor of the DINO loss's local terms."""
    ibot_weight: float = 1.0
    koleo_weight: float = 0.1
    koleo_distributed: bool = True
    """Seek neighbours among the samples of all processes, in rank order, so that a step does not depend on their
    number; otherwise among each process's own."""
    koleo_group_size: int | None = None
    """Seek them among this many consecutive samples; None: all. With micro-batches, those of one micro-batch: groups
    whose size divides the micro-batch make a step the same however it is split."""
    koleo_topk: int = 1
    student_temperature: float = 0.1
    gram: GramConfig | None = None

    def __post_init__(self) -> None:
        _within(self, 0, FOREVER, "dino_weight", "ibot_weight", "koleo_weight")
        _within(self, 2, FOREVER, "koleo_group_size")
        _within(self, 1, FOREVER, "koleo_topk")
        _within(self, 1e-4, FOREVER, "student_temperature")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and all that goes with the step."""

    lr: Schedule
    """Before scaling by `lr_scaling`."""
    lr_scaling: LrScaling = "sqrt_wrt_1024"
    weight_decay: Schedule = constant(0.04)
    momentum: Schedule = constant(0.994)
    """Of the EMA teacher."""
    teacher_temperature: Schedule = constant(0.07)
    last_layer_freeze_steps: int = 0
    """First steps of the stage in which the prototypes stay as they are."""
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 3.0
    """Largest gradient norm of backbone, DINO head and iBOT head, each by itself."""
    layer_decay: float = 1.0
    patch_embed_lr: float = 0.2
    """Further learning-rate factor of the patch embedding."""

    def __post_init__(self) -> None:
        _within(self, 0, FOREVER, "last_layer_freeze_steps", "patch_embed_lr")
        _within(self, 1e-12, FOREVER, "clip")
        _within(self, 1e-6, 1, "layer_decay")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise InputError(f"betas are {self.betas}; valid: two numbers in [0, 1), as (0.9, 0.999).")


@dataclass(frozen=True, kw_only=True)
class Resolution:
    """One way of a stage to make crops; a step uses one resolution, drawn in proportion to `share`."""

    crops: CropConfig
    share: float = 1.0

    def __post_init__(self) -> None:
        _within(self, 1e-9, FOREVER, "share")


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One stage of a run; all its schedules and step numbers count from the stage's own step 0."""

    name: str
    steps: int
    batch_size: int
    """Images of an optimizer step, over all processes and micro-batches."""
    resolutions: tuple[Resolution, ...]
    optimizer: OptimizerConfig
    losses: LossConfig = LossConfig()
    masks: MaskConfig = MaskConfig()
    drop_path: float = 0.0
    """Probability that a student's residual branch is left out, for each sample by itself."""
    rope: RopeAugment | None = None
    """Random changes of the student's patch coordinates."""
    frozen_backbone_steps: int = 0
    """First steps in which only the heads learn: fresh ones would spoil a trained backbone."""
    start: str = "previous"
    """"previous": the teacher of the stage before, with its heads; "random"; or a backbone's weights with fresh heads:
    a name of `list_weights()` or `list_models()`, or a file, folder, URL or hub id of such weights."""
    inflate: Literal["mean", "copy", "zero"] = "mean"
    """How such weights get the run's number of channels, if theirs is another (`densedino.pretrain.starting`)."""

    def __post_init__(self) -> None:
        _within(self, 1, FOREVER, "steps", "batch_size")
        _within(self, 0, 0.999, "drop_path")
        _within(self, 0, FOREVER, "frozen_backbone_steps")
        if not self.resolutions:
            raise InputError(f"stage {self.name!r} has no resolutions; give at least one Resolution(crops=…).")
        if not self.name or "/" in self.name:
            raise InputError(f"a stage's name is a folder's name: not {self.name!r}. Use letters, digits and dashes.")


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """A collection of images."""

    path: str
    """What `densedino.pretrain.sources.open_source` takes: folder, pattern, list in a .txt, tar shards, Hugging Face
    data set, Lance or feature store."""
    weight: float | None = None
    """Share of the images drawn from here, in proportion to the other sources' weights; None, for all of them: in
    proportion to their numbers of images."""

    def __post_init__(self) -> None:
        _within(self, 1e-9, FOREVER, "weight")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where images come from, and how they are read."""

    sources: tuple[SourceConfig, ...] = ()
    homogeneous: bool = False
    """Each batch comes from one source, drawn by weight (DINOv3 §3.1), instead of mixing them."""
    max_value: float | None = None
    """The pixel value that means 1; None: by type (255, 65535, 1.0)."""
    fast_jpeg: bool = False
    """Decode large JPEGs at a half of their size, or less, where that leaves three pixels down and across for each one
    of even the smallest crop: several times as fast from 9 megapixels on; crops differ by about half a level of 255."""
    workers: int | None = None
    """Reading processes; None: half of the cores, at most 8."""
    prefetch: int = 2
    """Batches that are prepared ahead."""

    def __post_init__(self) -> None:
        weights = [source.weight for source in self.sources]
        if None in weights and any(weights):
            raise InputError(f"sources have the weights {weights}; give each of them one, or none to any.")
        _within(self, 0, FOREVER, "workers")
        _within(self, 1, FOREVER, "prefetch")
        _within(self, 1e-12, FOREVER, "max_value")


@dataclass(frozen=True, kw_only=True)
class SnapshotConfig:
    """When the whole state is written, and what is kept."""

    every: int = 1000
    """Steps."""
    keep: int = 3
    """The newest ones."""
    keep_every: int | None = None
    """And those of steps that this divides; None: no others."""

    def __post_init__(self) -> None:
        _within(self, 1, FOREVER, "every", "keep", "keep_every")


@dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    """What is written about the run while it runs."""

    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    look_every: int | None = None
    """Steps between looks at the teacher's features; None: a twentieth of the run. The first and last step too."""
    seconds: float = 10.0
    """A look takes about this long: the first is timed, and smaller subsets are taken if need be, then kept."""
    size: int = 224
    """Pixels of the short side at which images are looked at."""
    images: int = 256
    """Training images whose features are measured, the same at every look."""
    pictures: tuple[str, ...] = ()
    """Images to draw over time; none named: six of the training images."""
    knn: str | None = None
    """A folder of class folders (maybe in train/ and val/), for the nearest-neighbour probe."""
    segmentation: str | None = None
    """A folder of images and masks (`densedino.images.labelled`), for the linear segmentation probe."""
    ignore_label: int = 255
    """The value of a mask that is no class: 11 in CamVid."""
    tensorboard: bool = True
    """Written where tensorboard is installed."""

    def __post_init__(self) -> None:
        _within(self, 1, FOREVER, "log_every", "look_every", "images")
        _within(self, 0, FOREVER, "seconds", "ignore_label")
        _within(self, 32, FOREVER, "size")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run. `densedino.pretrain.contradictions` tells what in it does not go together."""

    model: str | ViTSpec | ConvNeXtSpec
    """A name of `list_models()`, or a specification of one's own."""
    stages: tuple[StageConfig, ...]
    in_chans: int = 3
    dino_head: HeadConfig = HeadConfig()
    ibot_head: HeadConfig = HeadConfig()
    seed: int = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    """"bf16": backbone and heads under autocast; norms, RoPE, residuals, losses and weights stay in fp32."""
    fidelity: Fidelity = "released"
    """Set by `with_fidelity`, which sets it everywhere."""
    micro_batch_size: int | None = None
    """Images a process takes at a time; None: all of its share of the batch."""
    data: DataConfig = DataConfig()
    snapshots: SnapshotConfig = SnapshotConfig()
    monitor: MonitorConfig = MonitorConfig()
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    compile: bool = False

    def __post_init__(self) -> None:
        _within(self, 1, FOREVER, "in_chans", "micro_batch_size")
        _within(self, 0, FOREVER, "seed")
        if isinstance(self.model, str) and self.model not in MODELS:
            raise UnknownNameError("model", self.model, MODELS)
        if not self.stages:
            raise InputError("a run has at least one stage; give stages=(StageConfig(…), …).")

    @property
    def spec(self) -> ViTSpec | ConvNeXtSpec:
        """The model's row of the table, or the specification given."""
        return model_spec(self.model) if isinstance(self.model, str) else self.model

    def with_fidelity(self, fidelity: Fidelity) -> "RunConfig":
        """The same run, as the released weights were trained or as the papers say.

        That is: blur probabilities, RoPE drawn for each block or each forward pass, parameters without weight decay.
        """

        def stage(old: StageConfig) -> StageConfig:
            resolutions = tuple(replace(r, crops=replace(r.crops, fidelity=fidelity)) for r in old.resolutions)
            rope = old.rope and replace(old.rope, per_block=fidelity == "released")
            return replace(old, resolutions=resolutions, rope=rope)

        return replace(self, fidelity=fidelity, stages=tuple(stage(old) for old in self.stages))
