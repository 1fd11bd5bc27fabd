"""Owns which backbones an evaluation runs: from a name on the command line to an extractor for the protocol."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from densedino.engines.eager import LayerTokens, choose_device
from densedino.errors import InputError
from densedino.evals.foreign import FOREIGN, load_foreign
from densedino.features.extractor import FeatureExtractor, load

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from densedino.engines.protocol import Engine

__all__ = ["View", "WindowEngine", "baselines_of", "dense_layers", "load_backbone", "slug_of"]


@dataclass(frozen=True, kw_only=True)
class View:
    """How a backbone sees the images of a data set."""

    resize: int | tuple[int, int] | None = None
    """None for the image's own size, N for a short side of N pixels, (H, W) for exactly that."""
    window: int | None = None
    """Side of square windows in pixels; None for the whole image at once."""
    window_stride: int | None = None
    """Pixels from one window to the next; two thirds of the window if not given."""
    layers: tuple[int, ...] = ()
    """Blocks whose patches are put side by side; the last one, after its norm, if not given."""
    device: str = "auto"
    engine: str = "eager"
    precision: str = "auto"


def slug_of(model: str) -> str:
    """A name for files, of a model as it was asked for."""
    return re.sub(r"[^\w.+-]+", "_", model)


def baselines_of(models: Sequence[str], *, supervised: Sequence[str] = ()) -> tuple[str, ...]:
    """What `--baselines` adds: the same architectures untrained, EfficientNet-Lite0 if installed, raw colours.

    `supervised` are networks that the protocol trains end to end; they are added if their package is installed.
    """
    packages = {"lite0": "efficientnet_lite_pytorch", "unet": "segmentation_models_pytorch"}
    ours = [model.partition(":")[0] for model in models if model.partition(":")[0] not in FOREIGN]
    names = [*(f"{name}:random" for name in ours[:1]), "lite0", "raw", *supervised]
    there = [name for name in names if importlib.util.find_spec(packages.get(name, "densedino")) is not None]
    return tuple(name for name in dict.fromkeys(there) if name not in models)


def dense_layers(model: str, view: View) -> tuple[int, ...]:
    """The blocks whose patches are kept as the dense features; none for the last one alone."""
    return view.layers or ((0,) if model == "lite0" else ())  # its stride-16 map, as the last one has stride 32


def load_backbone(model: str, view: View) -> FeatureExtractor:
    """A backbone by its name in a plan.

    `vitt16` is an architecture or weights of ours, `vits16:weights.pth` with that file, `vits16:random` untrained;
    `lite0`, `raw`, `timm:NAME`, `torchvision:NAME` and `hf:NAME` are not ours (see `evals.foreign`).

    Raises:
        As `dd.load` and `load_foreign`.
    """
    kind, colon, rest = model.partition(":")
    if kind in FOREIGN:
        dino = load_foreign(kind, rest, device=choose_device(view.device))
    else:
        weights: Any = rest if colon else None
        dino = load(kind or None, weights=weights, device=view.device, engine=view.engine, precision=view.precision)
    dino = dino.with_transform(replace(dino.transform, resize=view.resize))
    if view.window is None:
        return dino
    stride = view.window_stride or view.window * 2 // 3
    engine = WindowEngine(dino.engine, window=view.window, stride=stride)
    return FeatureExtractor(engine, dino.transform, dino.card, reason="by windows")


class WindowEngine:
    """An engine that sees an image through overlapping windows, and gives the mean of the tokens that overlap.

    With an affine head (linear, after any fixed normalisation) that is the same as averaging the logits of windows.
    Window and stride are rounded to whole patches (downwards, the stride to one at least); the last window of a row
    or column ends with the image. CLS is the mean over windows.
    """

    name = "eager"

    def __init__(self, inner: Engine, *, window: int, stride: int) -> None:
        patch = inner.model.stride
        self._inner = inner
        self.window, self.stride = window // patch, max(1, stride // patch)
        if self.window < 1 or self.stride > self.window:
            raise InputError(
                f"windows of {window} pixels every {stride}: a window must hold a whole patch ({patch} pixels), and "
                "the stride must be no larger than the window."
            )
        self.model, self.device = inner.model, inner.device
        self.precision = f"{inner.precision} in windows of {self.window}/{self.stride} patches"

    def _starts(self, patches: int) -> list[int]:
        last = max(0, patches - self.window)
        return [*range(0, last, self.stride), last]

    def __call__(self, pixels: Tensor, *, layers: Sequence[int] = (-1,), norm: bool = True) -> list[LayerTokens]:
        """As the engine within, on [B, C, H, W] of any size."""
        patch = self.model.stride
        h, w = pixels.shape[2] // patch, pixels.shape[3] // patch
        places = [(y, x) for y in self._starts(h) for x in self._starts(w)]
        sums: list[list[Tensor]] = []
        for y, x in places:
            high, wide = min(self.window, h), min(self.window, w)
            part = pixels[:, :, y * patch : (y + high) * patch, x * patch : (x + wide) * patch]
            for i, tokens in enumerate(self._inner(part, layers=layers, norm=norm)):
                finer = tokens.patches.shape[1] // high
                if i == len(sums):
                    whole = tokens.patches.new_zeros(len(pixels), h * finer, w * finer, tokens.patches.shape[3])
                    sums.append([whole, whole.new_zeros(h * finer, w * finer, 1), tokens.cls * 0, tokens.registers * 0])
                where = slice(y * finer, (y + high) * finer), slice(x * finer, (x + wide) * finer)
                sums[i][0][:, where[0], where[1]] += tokens.patches
                sums[i][1][where] += 1
                sums[i][2] += tokens.cls / len(places)
                sums[i][3] += tokens.registers / len(places)
        return [LayerTokens(total / times, cls, registers) for total, times, cls, registers in sums]
