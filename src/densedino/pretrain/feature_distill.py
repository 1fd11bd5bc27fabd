"""Owns headless distillation: a student's tokens are trained to tell what any teachers say, through maps dropped after.

No prototypes and no classes: each teacher's features are standardised and reduced to their principal components, and a
linear map from the student's tokens to them is trained along. Teachers may have other strides, sizes and widths.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from densedino.errors import InputError
from densedino.pretrain.draws import draw
from densedino.pretrain.losses import gram_loss
from densedino.pretrain.step import StepReport, finish_step
from densedino.pretrain.teachers import Tokens, as_tokens

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from densedino.pretrain.settings import StageConfig
    from densedino.pretrain.step import Batch, StepValues

__all__ = [
    "FeatureHead",
    "FeatureState",
    "FeatureStudent",
    "OwnSpace",
    "TeacherConfig",
    "distance",
    "feature_losses",
    "feature_step",
    "fit_heads",
    "principal_components",
    "resize_map",
]

Distance = Literal["cosine", "smooth_l1", "both"]


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """A teacher, and what is learnt from it."""

    source: str
    """What `densedino.pretrain.teachers.open_teacher` takes: weights, or an .onnx file."""
    layer: int | None = None
    """Block whose tokens are learnt; None: the final ones."""
    tensor: str | None = None
    """Of an ONNX graph."""
    stride: int | None = None
    """Of an ONNX graph; None: 16."""
    size: int | None = None
    """Pixels of the short side at which it sees the crops, or whole pictures if they are cached; None: the crops' own
    size, and 448 for whole pictures. Larger than the student's, it tells finer things."""
    cached: bool = False
    """Ask once about whole pictures and keep the answers; otherwise ask about each crop."""
    cls_weight: float = 1.0
    """Of the image's summary: CLS, or the mean of the map where a network has none."""
    patch_weight: float = 1.0
    gram_weight: float = 0.0
    """Of the patches' similarities to each other, without a map between: they make the student's own geometry."""
    distance: Distance = "both"
    components: int | None = None
    """Principal components that are learnt; None: as many as there are channels."""
    own_space: bool = False
    """The student's vectors are to become the teacher's, as wide, themselves: nothing is standardised or mapped."""

    def __post_init__(self) -> None:
        weights = (self.cls_weight, self.patch_weight, self.gram_weight)
        if min(weights) < 0 or not any(weights):
            raise InputError(f"teacher {self.source!r} has the weights {weights}: none below 0, and one above it.")
        if (self.components is not None and self.components < 1) or (self.size is not None and self.size < 1):
            raise InputError(f"teacher {self.source!r}: components and size are at least 1, or None.")


def principal_components(features: Tensor, *, components: int | None = None) -> tuple[Tensor, Tensor]:
    """Mean [D] and basis [D, k]: (x − mean) @ basis has k uncorrelated values, with mean square 1 over all of them.

    Channels are brought to variance 1 first, so that none counts by its scale. Components keep their relative sizes: to
    whiten them would make as much of noise as of what matters.

    Args:
        features: [n, D].
        components: k; all D for None.
    """
    x = features.double()
    mean, std = x.mean(0), x.std(0).clamp_min(1e-6)
    x = (x - mean) / std
    values, vectors = torch.linalg.eigh(x.T @ x / len(x))
    k = min(components or x.shape[1], x.shape[1])
    basis = vectors.flip(1)[:, :k]
    scale = (values.flip(0)[:k].clamp_min(0).mean()).clamp_min(1e-12).rsqrt()
    return mean.float(), (basis * scale / std[:, None]).float()


def resize_map(features: Tensor, grid: tuple[int, int]) -> Tensor:
    """A map [B, D, h, w] on another grid over the same image: means where it gets coarser, bilinear where finer."""
    if features.shape[2:] == grid:
        return features
    return F.interpolate(features.float(), size=grid, mode="bilinear", antialias=True)


def distance(prediction: Tensor, target: Tensor, *, kind: Distance) -> Tensor:
    """Mean over all but the last dimension: 1 − cosine, smooth L1 (mean over channels), or both added."""
    prediction, target = prediction.float(), target.float()
    cosine = (1 - F.cosine_similarity(prediction, target, dim=-1)).mean() if kind != "smooth_l1" else 0.0
    smooth = F.smooth_l1_loss(prediction, target) if kind != "cosine" else 0.0
    return torch.as_tensor(cosine + smooth)


class FeatureHead(nn.Module):
    """A linear map from a student's vectors to a teacher's principal components; `basis` and `mean` are the teacher's.

    Args:
        student_dim: of the student's vectors.
        mean: [D] of `principal_components`.
        basis: [D, k].
    """

    def __init__(self, student_dim: int, mean: Tensor, basis: Tensor) -> None:
        super().__init__()
        self.linear = nn.Linear(student_dim, basis.shape[1])
        self.mean, self.basis = nn.Buffer(mean), nn.Buffer(basis)

    def forward(self, vectors: Tensor) -> Tensor:
        """[..., student_dim] -> [..., k]."""
        out: Tensor = self.linear(vectors)
        return out

    def target(self, vectors: Tensor) -> Tensor:
        """The teacher's [..., D] -> [..., k]."""
        return (vectors - self.mean) @ self.basis

    @torch.no_grad()
    def fit(self, student: Tensor, teacher: Tensor, *, ridge: float = 0.01) -> float:
        """Set the map to the best one for vectors [n, student_dim] and [n, D]; returns the share of variance it tells.

        Begun so, its first gradients do not spoil a student that knows something.
        """
        x, y = student.double(), self.target(teacher).double()
        # By the size of the vectors, not of their differences: where those are small, the map stays small too.
        size = x.square().mean().clamp_min(1e-12)
        mx, my = x.mean(0), y.mean(0)
        x, y = x - mx, y - my
        gram = x.T @ x / len(x)
        gram += ridge * size * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        weight = torch.linalg.solve(gram, x.T @ y / len(x)).T
        self.linear.weight.copy_(weight)
        self.linear.bias.copy_(my - weight @ mx)
        return float(1 - (y - x @ weight.T).square().sum() / y.square().sum().clamp_min(1e-12))


class OwnSpace(nn.Module):
    """Stands for a `FeatureHead` where student and teacher speak the same: no map."""

    def forward(self, vectors: Tensor) -> Tensor:
        """As they are."""
        return vectors

    def target(self, vectors: Tensor) -> Tensor:
        """As they are."""
        return vectors

    def fit(self, student: Tensor, teacher: Tensor) -> float:
        """The share of variance that the student tells."""
        left, all_of_it = (teacher - student).square().sum(), (teacher - teacher.mean(0)).square().sum()
        return float(1 - left / all_of_it.clamp_min(1e-12))


class FeatureStudent(nn.Module):
    """What learns: any network that makes a map, and its heads.

    Args:
        backbone: of `densedino.models`, or any module whose output `as_tokens` reads; a pyramid learns at each level.
    """

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.heads = nn.ModuleDict()

    def parts(self) -> dict[str, nn.Module]:
        """What gradients are clipped by: each by itself."""
        parts: dict[str, nn.Module] = {"backbone": self.backbone, "heads": self.heads}
        return {name: part for name, part in parts.items() if next(part.parameters(), None) is not None}

    def tokens(self, pixels: Tensor, *, draws: Any = None) -> Tokens:
        """Summary and maps of normalised pixels [B, C, H, W]; `draws` as `training_features` takes them."""
        features: Any = getattr(self.backbone, "training_features", None)
        if features is None:
            return as_tokens(self.backbone(pixels), what="the student")
        stride = int(self.backbone.stride)  # type: ignore[arg-type]
        cls, patches = features(pixels, draws=draws)
        grid = (pixels.shape[-2] // stride, pixels.shape[-1] // stride)
        return Tokens(cls=cls, maps=(patches.transpose(1, 2).unflatten(2, grid),))


class FeatureState(nn.Module):
    """A student and its moving average, which is what a run is for."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.student = FeatureStudent(backbone)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> FeatureState:
        """Set the student's mode; the average stays in eval mode."""
        super().train(mode)
        self.teacher.eval()
        return self


def feature_losses(
    student: Tokens, targets: Sequence[Tokens], heads: nn.ModuleDict, teachers: Sequence[TeacherConfig]
) -> tuple[dict[str, Tensor], Tensor]:
    """Each teacher's terms before their weights, "0_cls", "0_patch", "0_gram" …, and their weighted sum.

    Args:
        student: of crops.
        targets: each teacher's of the same crops.
        heads: of `fit_heads`.
        teachers: their weights and distances.
    """
    terms: dict[str, Tensor] = {}
    total = student.maps[0].new_zeros((), dtype=torch.float32)
    for number, (target, config) in enumerate(zip(targets, teachers, strict=True)):
        for name, weight in (("cls", config.cls_weight), ("patch", config.patch_weight), ("gram", config.gram_weight)):
            if weight > 0:
                pairs = _pairs(student, target, number, name)
                term = torch.stack([_term(name, heads[key], s, t, config.distance) for key, s, t in pairs]).mean()
                terms[f"{number}_{name}"] = term
                total = total + weight * term
    return terms, total


def _pairs(student: Tokens, target: Tokens, number: int, name: str) -> list[tuple[str, Tensor, Tensor]]:
    """Key of the head, student's vectors and teacher's, of every level and every map."""
    if name == "cls":
        return [(f"{number}_cls", student.summary(), target.summary())]
    return [
        (f"{number}_{i}_{level}", _rows(own), _rows(resize_map(theirs, (own.shape[2], own.shape[3]))))
        for i, theirs in enumerate(target.maps)
        for level, own in enumerate(student.maps)
    ]


def _rows(features: Tensor) -> Tensor:
    """[B, D, h, w] -> [B, h·w, D]."""
    return features.flatten(2).transpose(1, 2)


def _term(name: str, head: nn.Module, own: Tensor, theirs: Tensor, kind: Distance) -> Tensor:
    assert isinstance(head, FeatureHead | OwnSpace)
    wanted = head.target(theirs.float())
    return gram_loss(own.float(), wanted) if name == "gram" else distance(head(own), wanted, kind=kind)


@torch.no_grad()
def fit_heads(
    state: FeatureState,
    batches: Sequence[Batch],
    asks: Sequence[Callable[[Batch], Tokens]],
    teachers: Sequence[TeacherConfig],
) -> dict[str, float]:
    """Make the heads anew: standardise what the teachers say of some batches, and fit the maps to the student.

    Returns:
        For each head the share of the teacher's variance that the student already tells.
    """
    state.eval()
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for batch in batches:
        own = state.student.tokens(batch.crops.global_crops.flatten(0, 1)).detach()
        for number, ask in enumerate(asks):
            theirs = ask(batch)
            for name in ("cls", "patch"):
                for key, s, t in _pairs(own, theirs, number, name):
                    seen.setdefault(key, []).append((s.reshape(-1, s.shape[-1]), t.reshape(-1, t.shape[-1]).float()))
    heads, told = nn.ModuleDict(), {}
    for key, parts in seen.items():
        s, t = torch.cat([s for s, _ in parts]), torch.cat([t for _, t in parts])
        head = _make_head(s, t, teachers[int(key.split("_")[0])])
        told[key] = head.fit(s, t)
        heads[key] = head
    state.student.heads = heads
    state.teacher.heads = copy.deepcopy(heads).requires_grad_(False)
    state.train()
    return told


def _make_head(student: Tensor, teacher: Tensor, config: TeacherConfig) -> FeatureHead | OwnSpace:
    width = teacher.shape[1]
    if not config.own_space:
        # Few images have few summaries: no more components than they can tell apart.
        components = min(config.components or width, width, max(1, len(teacher) - 1))
        return FeatureHead(student.shape[1], *principal_components(teacher, components=components)).to(student.device)
    if student.shape[1] != width:
        raise InputError(
            f"teacher {config.source!r} has vectors of {width} numbers and the student of {student.shape[1]}: they are "
            "not one space. Set own_space=False."
        )
    return OwnSpace()


def feature_step(
    state: FeatureState,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    asks: Sequence[Callable[[Batch], Tokens]],
    *,
    teachers: Sequence[TeacherConfig],
    stage: StageConfig,
    values: StepValues,
    seed: int,
    step: int,
    precision: Literal["fp32", "bf16"] = "fp32",
) -> StepReport:
    """Exactly one optimizer step on prepared crops, as `densedino.pretrain.step.train_step` is one.

    Args:
        state: changed in place; with heads of `fit_heads`.
        optimizer: of the student's parameters, with the groups of `densedino.pretrain.optim`.
        batches: micro-batches of the step; the student sees their global crops.
        asks: for each teacher, a function from a micro-batch to what it says of its global crops [G·b].
        teachers: weights and distances.
        stage: stochastic depth, RoPE and clipping are read.
        values: of this step.
        seed: of the run.
        step: of the run, for the draws.
        precision: of the student's forward and backward pass.
    """
    state.train()
    optimizer.zero_grad(set_to_none=True)
    images = sum(map(len, batches))
    spec = getattr(state.student.backbone, "spec", None)
    found = []
    for batch in batches:
        crops = batch.crops.global_crops
        draws = (
            None
            if spec is None
            else draw(
                spec,
                seed=seed,
                step=step,
                places=batch.places,
                crops=range(len(crops)),
                drop_path=stage.drop_path,
                rope=stage.rope,
                device=crops.device,
            )
        )
        targets = [ask(batch) for ask in asks]
        frozen = values.frozen_backbone
        with (
            torch.set_grad_enabled(not frozen),
            torch.autocast(crops.device.type, dtype=torch.bfloat16, enabled=precision == "bf16"),
        ):
            own = state.student.tokens(crops.flatten(0, 1), draws=draws)
        terms, total = feature_losses(own, targets, state.student.heads, teachers)
        (total * (len(batch) / images)).backward()
        found.append({name: term.detach() for name, term in terms.items()} | {"total": total.detach()})
    return finish_step(
        state.student, state.teacher, optimizer, batches, losses=found, values=values, clip=stage.optimizer.clip
    )
