"""Owns multi-crop augmentation: one picture in, the global, local and Gram crops of one step out, any channels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from densedino.errors import InputError
from densedino.pretrain import Fidelity  # noqa: TC001 (densedino.config reads the annotations at run time)
from densedino.pretrain.distortions import Distortion, Jitter, distort
from densedino.pretrain.randomness import counted_generator

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from torch import Tensor


__all__ = ["CropConfig", "Crops", "make_crops", "random_box", "stack_crops"]


@dataclass(frozen=True, kw_only=True)
class CropConfig:
    """What crops are made of a picture (DINO §3.1, DINOv3 §3.2); the defaults are those of the released recipes."""

    mean: tuple[float, ...]
    """Per channel, of values in [0, 1]."""
    std: tuple[float, ...]
    global_size: int = 224
    local_size: int = 96
    num_global: int = 2
    num_local: int = 8
    global_scale: tuple[float, float] = (0.32, 1.0)
    """Share of the picture's area in a global crop, uniform; aspect ratio 3:4 to 4:3."""
    local_scale: tuple[float, float] = (0.05, 0.32)
    hflip: float = 0.5
    """Probability; 0 in the 7B and distillation recipes."""
    jitter: Jitter = Jitter()  # noqa: RUF009 (frozen)
    jitter_probability: float = 0.8
    grayscale: float = 0.2
    solarize: float = 0.2
    """Probability, of the second and later global crops."""
    fidelity: Fidelity = "released"
    """Blur probabilities of (first global, other global, local) crops: "paper" (1, 0.1, 0.5); "released" (0, 0.9, 0.5),
    since the code that trained the released weights takes the probability for its complement."""
    rgb: tuple[int, int, int] | None = (0, 1, 2)
    """The channels that are red, green and blue: only they get jitter, grayscale and solarisation. None: no channel."""
    share_jitter: bool = False
    """Jitter and grayscale are drawn once for all crops of a picture."""
    local_from_global: bool = False
    """Local crops are windows of the global crops, in turn, whose corners lie on the patch grid."""
    stride: int = 16
    """Pixels of a patch: the grid of `local_from_global`."""
    gram_size: int | None = None
    """Size of the Gram teacher's crops, which show what the global crops show; None: no such crops."""
    gram_distortions: bool = False
    """The Gram teacher's crops are the student's, colours and blur included, at their own size."""

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std):
            raise InputError(f"mean has {len(self.mean)} channels and std {len(self.std)}; give one of each a channel.")
        if self.rgb is not None and max(self.rgb) >= len(self.mean):
            raise InputError(
                f"rgb={self.rgb} names a channel that {len(self.mean)}-channel pictures do not have. Give the indices"
                " of red, green and blue, or rgb=None to leave colours alone."
            )
        if self.local_from_global and self.local_size > self.global_size:
            raise InputError(f"local crops of {self.local_size} px do not fit in global ones of {self.global_size} px.")

    @property
    def blur_probabilities(self) -> tuple[float, float, float]:
        """Of the first global, the other global, and the local crops."""
        return (1.0, 0.1, 0.5) if self.fidelity == "paper" else (0.0, 0.9, 0.5)


@dataclass(frozen=True, kw_only=True, eq=False)
class Crops:
    """The crops of one picture, normalised fp32; stacked over pictures, each tensor has B as second dimension."""

    global_crops: Tensor
    """[G, C, size, size]"""
    local_crops: Tensor
    """[L, C, size, size]"""
    gram_crops: Tensor | None = None
    """[G, C, size, size]: crop g shows what global crop g shows."""
    offsets: Tensor | None = None
    """[L, 2] with `local_from_global`: top and left of each local crop in global crop (index mod G), in pixels."""
    windows: Tensor | None = None
    """[G, 5], of each global crop: top, left, height and width in shares of the picture's; 1 if mirrored, else 0."""

    def map(self, function: Callable[[Tensor], Tensor]) -> Crops:
        """The crops with `function` applied to each tensor that is there."""
        gram, offsets, windows = (
            None if x is None else function(x) for x in (self.gram_crops, self.offsets, self.windows)
        )
        return Crops(
            global_crops=function(self.global_crops),
            local_crops=function(self.local_crops),
            gram_crops=gram,
            offsets=offsets,
            windows=windows,
        )

    def finite(self) -> Tensor:
        """[B] bool, of stacked crops: whether all of an image's are finite."""
        views = [x for x in (self.global_crops, self.local_crops, self.gram_crops) if x is not None and len(x)]
        return torch.stack([torch.isfinite(x).flatten(2).all(-1).all(0) for x in views]).all(0)


def make_crops(
    image: Tensor, config: CropConfig, *, seed: int, step: int, index: int, max_value: float | None = None
) -> Crops:
    """Draw the crops of one picture; the same (seed, step, index) give the same crops, in any process or order.

    Args:
        image: [C, H, W], uint8, uint16 or float. Fastest in uint8 with channels last in memory (`.permute(2, 0, 1)` of
            a decoded array).
        config: what to make.
        seed: of the run.
        step: of the run.
        index: of the sample.
        max_value: the value that means 1: by default 255 for uint8, 65535 for uint16 and 1 for floats.

    Raises:
        InputError: channels other than the configuration's, or colours far out of [0, 1].
    """
    if image.ndim != 3 or len(image) != len(config.mean):
        raise InputError(
            f"crops are made of pictures [C, H, W] with {len(config.mean)} channels; got shape {tuple(image.shape)}."
            " Set mean, std and rgb for the channels of your pictures."
        )
    rng = counted_generator("crops", seed=seed, step=step, index=index)
    white = max_value or {torch.uint8: 255.0, torch.uint16: 65535.0}.get(image.dtype, 1.0)
    if image.dtype.is_floating_point and config.rgb and image[list(config.rgb)].abs().max() > 2 * white:
        raise InputError(
            f"the colours of float pictures lie in [0, {white:g}]; got {image.abs().max():g}. Pass max_value, the value"
            " that means white, or rgb=None if the channels are no colours."
        )
    shared = _draw_colours(rng, config) if config.share_jitter else None
    size = max(config.global_size, config.gram_size or 0)
    drawn = [_random_crop(image, size, config.global_scale, white, rng, config) for _ in range(config.num_global)]
    bases = [base for base, _ in drawn]
    views, gram, locals_, offsets = [], [], [], []
    for g, base in enumerate(bases):
        distortion = _draw_distortion(rng, config, kind=min(g, 1), colours=shared)
        if config.gram_size is not None and config.gram_distortions:
            base = distort(base, distortion, rgb=config.rgb)
            distortion = Distortion()
        views.append(distort(_resize(base, config.global_size), distortion, rgb=config.rgb))
        gram += [_resize(base, config.gram_size)] if config.gram_size is not None else []
    for local in range(config.num_local):
        if config.local_from_global:
            top, left = (int(rng.integers((config.global_size - config.local_size) // config.stride + 1)) for _ in "yx")
            offsets.append((top * config.stride, left * config.stride))
            crop = _window(
                _resize(bases[local % config.num_global], config.global_size), offsets[-1], config.local_size
            )
        else:
            crop, _ = _random_crop(image, config.local_size, config.local_scale, white, rng, config)
        locals_.append(distort(crop, _draw_distortion(rng, config, kind=2, colours=shared), rgb=config.rgb))
    return Crops(
        global_crops=_normalize(views, config, config.global_size),
        local_crops=_normalize(locals_, config, config.local_size),
        gram_crops=_normalize(gram, config, config.gram_size) if config.gram_size is not None else None,
        offsets=torch.tensor(offsets).view(-1, 2) if config.local_from_global else None,
        windows=torch.tensor([window for _, window in drawn]),
    )


def stack_crops(samples: Sequence[Crops]) -> Crops:
    """Stack the crops of B pictures along a new second dimension: [G, B, C, H, W] and so on."""

    def stack(name: str) -> Tensor | None:
        parts = [getattr(sample, name) for sample in samples]
        return None if parts[0] is None else torch.stack(parts, dim=1)

    global_crops, local_crops = stack("global_crops"), stack("local_crops")
    assert global_crops is not None
    assert local_crops is not None
    return Crops(
        global_crops=global_crops,
        local_crops=local_crops,
        gram_crops=stack("gram_crops"),
        offsets=stack("offsets"),
        windows=stack("windows"),
    )


def random_box(
    height: int, width: int, *, scale: tuple[float, float], rng: np.random.Generator, tries: int = 10
) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a window with `scale` of the area, uniform, and 3:4 to 4:3, log-uniform.

    Where no window fits in `tries` tries, the largest central one with an allowed aspect ratio.
    """
    limit = math.log(4 / 3)
    for _ in range(tries):
        area, aspect = height * width * rng.uniform(*scale), math.exp(rng.uniform(-limit, limit))
        h, w = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < h <= height and 0 < w <= width:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    h, w = min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


def _random_crop(
    image: Tensor, size: int, scale: tuple[float, float], white: float, rng: np.random.Generator, config: CropConfig
) -> tuple[Tensor, list[float]]:
    """A crop, and its row of `Crops.windows`."""
    H, W = image.shape[1:]
    top, left, h, w = random_box(H, W, scale=scale, rng=rng)
    crop = image[:, top : top + h, left : left + w]
    if image.dtype == torch.uint8:  # resized as bytes: four times as fast, and rounded as Pillow does
        parts = crop.split(3)  # torch's fast path for bytes takes up to four channels
        crop = torch.cat([_resize(part, size) for part in parts]).float().div_(white)
    else:
        crop = _resize(crop.float() / white, size)
        crop = crop if image.dtype.is_floating_point else crop.clamp_(0, 1)
    mirrored = rng.random() < config.hflip
    return crop.flip(-1) if mirrored else crop, [top / H, left / W, h / H, w / W, float(mirrored)]


def _resize(image: Tensor, size: int) -> Tensor:
    if image.shape[1:] == (size, size):
        return image
    return F.interpolate(image[None], size=(size, size), mode="bicubic", antialias=True)[0]


def _window(image: Tensor, corner: tuple[int, int], size: int) -> Tensor:
    return image[:, corner[0] : corner[0] + size, corner[1] : corner[1] + size]


def _draw_colours(rng: np.random.Generator, config: CropConfig) -> Distortion:
    jitter = config.jitter.draw(rng) if rng.random() < config.jitter_probability else ()
    return Distortion(jitter=jitter, grayscale=rng.random() < config.grayscale)


def _draw_distortion(
    rng: np.random.Generator, config: CropConfig, *, kind: int, colours: Distortion | None
) -> Distortion:
    """For a crop of kind 0 (first global), 1 (other global) or 2 (local); `colours` if they are shared."""
    colours = colours or _draw_colours(rng, config)
    blurred = rng.random() < config.blur_probabilities[kind]
    return Distortion(
        jitter=colours.jitter,
        grayscale=colours.grayscale,
        sigma=rng.uniform(0.1, 2.0) if blurred else None,
        solarize=kind == 1 and rng.random() < config.solarize,
    )


def _normalize(crops: list[Tensor], config: CropConfig, size: int) -> Tensor:
    C = len(config.mean)
    if not crops:
        return torch.empty(0, C, size, size)
    mean, std = torch.tensor(config.mean).view(C, 1, 1), torch.tensor(config.std).view(C, 1, 1)
    return torch.stack(crops).sub_(mean).div_(std)
