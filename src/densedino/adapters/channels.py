"""Owns other channels than red, green and blue: the first convolution made wider, and a small trainable way into it.

Both end as one model of N input channels, whose weights are one file: `dd.load(weights=…)` takes it like any other.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from densedino.engines.choice import build_engine, choose_engine
from densedino.errors import InputError, UnknownNameError
from densedino.features.extractor import FeatureExtractor
from densedino.models.catalog import ViTSpec
from densedino.weights.convert import write_weights

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Sequence

    from densedino.models.convnext import ConvNeXt
    from densedino.models.vit import VisionTransformer

__all__ = ["ChannelAdapter", "Inflation", "align_channels", "inflate", "save_channels"]

Inflation = Literal["copy", "mean", "zero"]


def first_convolution(model: VisionTransformer | ConvNeXt) -> nn.Conv2d:
    """The convolution that sees the channels."""
    return next(module for module in model.modules() if isinstance(module, nn.Conv2d))


def inflate(
    dino: FeatureExtractor,
    *,
    channels: int,
    how: Inflation = "copy",
    rgb: Sequence[int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> FeatureExtractor:
    """A model of `channels` input channels, made of one of three.

    Args:
        dino: its model stays as it is.
        channels: how many.
        how: "copy": channel n gets the filters of colour n mod 3, times 3 / channels, so that grey gives what grey gave
            (Wang et al. 2016 for videos; timm does so too). "mean": every channel gets the mean filter, times
            3 / channels. "zero": the channels `rgb` keep their filters, all others begin at 0, so that features are
            those of the colours alone until it is trained.
        rgb: with "zero", where red, green and blue are among the channels; (0, 1, 2) if not given.
        mean: per channel, of values in [0, 1]; if not given, that of the colours whose filters a channel got.
        std: likewise.

    Raises:
        InputError: a model that has not three channels, or places and statistics that do not fit.
        UnknownNameError: another `how`.
    """
    if how not in get_args(Inflation):
        raise UnknownNameError("inflation", how, get_args(Inflation))
    if dino.transform.in_chans != 3 or channels < 1:
        raise InputError(
            f"a model of {dino.transform.in_chans} channels to {channels}: inflation is from 3 to 1 or more."
        )
    places = tuple(rgb) if rgb is not None else (0, 1, 2)
    if how == "zero" and (len(set(places)) != 3 or not all(0 <= place < channels for place in places)):
        raise InputError(f"rgb={places}: give three different numbers of channels, 0 to {channels - 1}.")
    mix = _mix(channels, how, places)
    share = mix / mix.sum(0).clamp(min=1e-12)  # of each colour in what a channel's filters are made of
    share = torch.where(mix.sum(0) > 0, share, 1 / 3)
    return _with_channels(
        dino,
        mix,
        torch.zeros(3),
        mean=_given(mean, torch.tensor(dino.transform.mean) @ share, channels, "mean"),
        std=_given(std, torch.tensor(dino.transform.std) @ share, channels, "std"),
        note=f"first convolution made of 3 channels' by {how}",
    )


def _mix(channels: int, how: Inflation, places: tuple[int, ...]) -> Tensor:
    """[3, channels]: how much of each colour's filters a channel gets."""
    mix = torch.zeros(3, channels)
    if how == "mean":
        mix.fill_(1 / channels)
    elif how == "copy":
        mix[torch.arange(channels) % 3, torch.arange(channels)] = 3 / channels
    else:
        mix[torch.arange(3), torch.tensor(places)] = 1.0
    return mix


def _given(values: Sequence[float] | None, default: Tensor, channels: int, name: str) -> tuple[float, ...]:
    if values is None:
        return tuple(default.tolist())
    if len(values) != channels:
        raise InputError(f"{name} has {len(values)} values for {channels} channels.")
    return tuple(values)


def _with_channels(
    dino: FeatureExtractor, mix: Tensor, shift: Tensor, *, mean: Sequence[float], std: Sequence[float], note: str
) -> FeatureExtractor:
    """The model with filters Σ colour mix[colour, channel], and what a constant `shift` of the colours adds."""
    model = copy.deepcopy(dino.model)
    conv = first_convolution(model)
    old = conv.weight.detach()
    side = conv.kernel_size[0]
    wide = nn.Conv2d(mix.shape[1], len(old), side, stride=side, device=old.device, dtype=old.dtype)
    bias = conv.bias.detach() if conv.bias is not None else old.new_zeros(len(old))
    with torch.no_grad():
        wide.weight.copy_(torch.einsum("dcyx,cn->dnyx", old, mix.to(old)))
        assert wide.bias is not None
        wide.bias.copy_(bias + torch.einsum("dcyx,c->d", old, shift.to(old)))
    for parent in model.modules():
        for name, child in parent.named_children():
            if child is conv:
                setattr(parent, name, wide)
    model.in_chans = mix.shape[1]
    model.eval()
    exact = dino.precision if dino.precision in ("fp32", "bf16") else "fp32"
    choice = choose_engine("eager", precision=exact, device=dino.device, parameters=0, memory=False)
    transform = replace(dino.transform, mean=tuple(mean), std=tuple(std))
    card = replace(
        dino.card,
        mean=transform.mean,
        std=transform.std,
        in_chans=mix.shape[1],
        sha256=_digest(dino, mix, shift),
        notes=(*dino.card.notes, note),
    )
    return FeatureExtractor(build_engine(choice, model, device=dino.device), transform, card, reason=choice.reason)


def _digest(dino: FeatureExtractor, mix: Tensor, shift: Tensor) -> str:
    import hashlib

    numbers = torch.cat([mix.detach().float().cpu().flatten(), shift.detach().float().cpu()])
    return hashlib.sha256(dino.card.sha256.encode() + numbers.numpy().tobytes()).hexdigest()


class ChannelAdapter(nn.Module):
    """N channels → the three that a frozen model takes: a matrix and a shift, which is all that is trained.

    It begins as a selection: channels `rgb` as they are, the others not seen; or where there are no colours (radar,
    elevation), as the mean of all channels in each. `fold` makes one model of adapter and backbone, exactly: a matrix
    before a convolution is a convolution.
    """

    def __init__(self, channels: int, *, rgb: Sequence[int] | None = None) -> None:
        super().__init__()
        if rgb is not None and (len(rgb) != 3 or not all(0 <= place < channels for place in rgb)):
            raise InputError(f"rgb={tuple(rgb)}: give three numbers of channels, 0 to {channels - 1}, or None.")
        start = torch.full((3, channels), 1 / channels)
        if rgb is not None:
            start = torch.zeros(3, channels)
            start[torch.arange(3), torch.tensor(list(rgb))] = 1.0
        self.mix = nn.Parameter(start)
        self.shift = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, H, W] → [B, 3, H, W], both normalised."""
        return F.conv2d(x, self.mix[..., None, None], self.shift)

    def fold(self, dino: FeatureExtractor, *, mean: Sequence[float], std: Sequence[float]) -> FeatureExtractor:
        """One model of N channels that gives what `dino`'s gives of this adapter's output.

        Args:
            dino: whose backbone the adapter was trained before.
            mean: per channel, of values in [0, 1]: what the adapter's input was normalised by.
            std: likewise.

        Raises:
            InputError: a model that has not three channels, or statistics that do not fit.
        """
        channels = self.mix.shape[1]
        if dino.transform.in_chans != 3:
            raise InputError(f"the model has {dino.transform.in_chans} channels; an adapter is for one of 3.")
        mix, shift = self.mix.detach().cpu(), self.shift.detach().cpu()
        checked = [_given(values, torch.zeros(0), channels, name) for name, values in (("mean", mean), ("std", std))]
        return _with_channels(dino, mix, shift, mean=checked[0], std=checked[1], note="a channel adapter is folded in")


def align_channels(
    dino: FeatureExtractor,
    adapter: ChannelAdapter,
    pairs: Iterable[tuple[Tensor, Tensor]],
    *,
    learning_rate: float = 0.01,
) -> list[float]:
    """Train an adapter so that its channels give the features that the colours of the same place give.

    For sensors that no colours belong to: radar or elevation beside an optical image of the same ground. The backbone
    stays as it is.

    Args:
        dino: a model of three channels, by PyTorch.
        adapter: changed in place.
        pairs: normalised batches ([B, N, H, W] of the new channels, [B, 3, H, W] of colours), a step each.
        learning_rate: of Adam.

    Returns:
        Per step 1 - cosine between the patches of both, on average.
    """
    model = dino.model
    optimizer = torch.optim.Adam(adapter.parameters(), lr=learning_rate)
    losses = []
    for channels, colours in pairs:
        with torch.no_grad():
            target = _patches(model, colours.to(dino.device))
        loss = 1 - F.cosine_similarity(_patches(model, adapter(channels.to(dino.device))), target, dim=-1).mean()
        trained = list(adapter.parameters())
        for parameter, gradient in zip(trained, torch.autograd.grad(loss, trained), strict=True):
            parameter.grad = gradient  # and none on the backbone
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def _patches(model: VisionTransformer | ConvNeXt, pixels: Tensor) -> Tensor:
    (patches,) = model.get_intermediate_layers(pixels, n=1)
    assert isinstance(patches, Tensor)
    return patches


def save_channels(dino: FeatureExtractor, path: str | os.PathLike[str]) -> str:
    """Write a model with its channels and their statistics as a .safetensors file; `dd.load(weights=path)` reads it.

    Returns:
        The fingerprint of its tensors.

    Raises:
        StateDictError: tensors that are not finite.
    """
    spec = dino.model.spec
    return write_weights(
        dino.model.state_dict(), path, card=dino.card, spec=spec if isinstance(spec, ViTSpec) else None
    )
