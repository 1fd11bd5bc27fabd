"""Owns the one table of architectures. Constructor, loader, converters and command line all read it.

The numbers are those of the DINOv3 paper (Siméoni et al. 2025, arXiv:2508.10104, tables 2 and 16) and of the
ConvNeXt paper (Liu et al. 2022). No torch is imported until a model is built.
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, overload

from densedino.errors import InputError, UnknownNameError

if TYPE_CHECKING:
    import torch

    from densedino.models.convnext import ConvNeXt
    from densedino.models.vit import VisionTransformer

__all__ = ["MODELS", "ConvNeXtSpec", "ViTSpec", "create_model", "list_models", "model_spec"]


@dataclass(frozen=True, kw_only=True)
class ViTSpec:
    """A plain pre-norm vision transformer with axial RoPE, LayerScale and register tokens."""

    name: str
    embed_dim: int
    depth: int
    num_heads: int
    hidden_dim: int
    ffn: Literal["mlp", "swiglu"] = "mlp"
    qkv_bias: bool = True
    num_register_tokens: int = 4
    patch_size: int = 16
    norm_eps: float = 1e-5
    layer_scale: float = 1e-5
    rope_base: float = 100.0
    local_cls_norm: bool = False
    """A second norm that only training uses, on the CLS and registers of local crops. Every 7B checkpoint has it."""
    pruned: tuple[tuple[int, int], ...] = ()
    """(heads, hidden width) of each block of a pruned model. Heads stay `head_dim` wide, and tokens `embed_dim`."""

    def __post_init__(self) -> None:
        if self.pruned and len(self.pruned) != self.depth:
            raise InputError(f"{self.name} of depth {self.depth} has {len(self.pruned)} pruned blocks; one each.")

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.embed_dim // self.num_heads

    @property
    def blocks(self) -> tuple[tuple[int, int], ...]:
        """(heads, hidden width) of each block."""
        return self.pruned or ((self.num_heads, self.hidden_dim),) * self.depth

    @property
    def stride(self) -> int:
        """Pixels from one token to the next."""
        return self.patch_size


@dataclass(frozen=True, kw_only=True)
class ConvNeXtSpec:
    """A ConvNeXt whose CLS is the mean of the last map, and whose final norm is shared by CLS and patches."""

    name: str
    depths: tuple[int, int, int, int]
    dims: tuple[int, int, int, int]
    norm_eps: float = 1e-6
    layer_scale: float = 1e-6

    @property
    def embed_dim(self) -> int:
        """Width of the last stage, which is the width of the tokens."""
        return self.dims[-1]

    @property
    def num_register_tokens(self) -> int:
        """A ConvNeXt has none."""
        return 0

    @property
    def stride(self) -> int:
        """Pixels from one token of the last stage to the next."""
        return 32


_SPECS: tuple[ViTSpec | ConvNeXtSpec, ...] = (
    ViTSpec(name="vitt16", embed_dim=192, depth=12, num_heads=3, hidden_dim=768),
    ViTSpec(name="vits16", embed_dim=384, depth=12, num_heads=6, hidden_dim=1536),
    ViTSpec(name="vits16plus", embed_dim=384, depth=12, num_heads=6, hidden_dim=1536, ffn="swiglu"),
    ViTSpec(name="vitb16", embed_dim=768, depth=12, num_heads=12, hidden_dim=3072),
    ViTSpec(name="vitl16", embed_dim=1024, depth=24, num_heads=16, hidden_dim=4096),
    ViTSpec(  # of the paper's ImageNet-1k recipe; no weights of it were released
        name="vitl16_plain",
        embed_dim=1024,
        depth=24,
        num_heads=16,
        hidden_dim=4096,
        num_register_tokens=0,
        norm_eps=1e-6,
    ),
    ViTSpec(name="vitl16plus", embed_dim=1024, depth=24, num_heads=16, hidden_dim=4096, ffn="swiglu"),
    ViTSpec(name="vith16plus", embed_dim=1280, depth=32, num_heads=20, hidden_dim=5120, ffn="swiglu"),
    ViTSpec(
        name="vit7b16",
        embed_dim=4096,
        depth=40,
        num_heads=32,
        hidden_dim=8192,
        ffn="swiglu",
        qkv_bias=False,
        local_cls_norm=True,
    ),
    ConvNeXtSpec(name="convnext_tiny", depths=(3, 3, 9, 3), dims=(96, 192, 384, 768)),
    ConvNeXtSpec(name="convnext_small", depths=(3, 3, 27, 3), dims=(96, 192, 384, 768)),
    ConvNeXtSpec(name="convnext_base", depths=(3, 3, 27, 3), dims=(128, 256, 512, 1024)),
    ConvNeXtSpec(name="convnext_large", depths=(3, 3, 27, 3), dims=(192, 384, 768, 1536)),
    # Tiny ones with every branch of the real ones, so that the whole pipeline runs in a test.
    ViTSpec(name="debug_vit", embed_dim=32, depth=2, num_heads=2, hidden_dim=64),
    ViTSpec(
        name="debug_vit_swiglu",
        embed_dim=32,
        depth=2,
        num_heads=2,
        hidden_dim=64,
        ffn="swiglu",
        qkv_bias=False,
        local_cls_norm=True,
    ),
    ConvNeXtSpec(name="debug_convnext", depths=(1, 1, 2, 1), dims=(8, 16, 24, 32)),
)

MODELS: dict[str, ViTSpec | ConvNeXtSpec] = {spec.name: spec for spec in _SPECS}


def list_models(pattern: str = "*") -> list[str]:
    """Names of all architectures that match a shell-style `pattern`, in the table's order."""
    return [name for name in MODELS if fnmatch.fnmatch(name, pattern)]


def model_spec(name: str) -> ViTSpec | ConvNeXtSpec:
    """The table's row for `name`.

    Raises:
        UnknownNameError: no such architecture; the message names the nearest.
    """
    if name not in MODELS:
        raise UnknownNameError("model", name, MODELS)
    return MODELS[name]


@overload
def create_model(
    name: ViTSpec, *, in_chans: int = 3, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> VisionTransformer: ...
@overload
def create_model(
    name: ConvNeXtSpec, *, in_chans: int = 3, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> ConvNeXt: ...
@overload
def create_model(
    name: str | ViTSpec | ConvNeXtSpec,
    *,
    in_chans: int = 3,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> VisionTransformer | ConvNeXt: ...
def create_model(
    name: str | ViTSpec | ConvNeXtSpec,
    *,
    in_chans: int = 3,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> VisionTransformer | ConvNeXt:
    """Build a backbone with freshly initialised weights (paper's initialisation), in eval mode.

    Args:
        name: a name of `list_models()`, or a spec (`dataclasses.replace` one for a variant).
        in_chans: input channels, 1 or more.
        device: where the parameters live; "meta" builds shapes only, without memory (7B in a second).
        dtype: of the parameters; float32 if not given.

    Returns:
        A plain `nn.Module` with `forward_features` and `get_intermediate_layers`.

    Raises:
        UnknownNameError: no such architecture.
        InputError: `in_chans` is not a positive integer.
    """
    import torch

    from densedino.models.convnext import ConvNeXt
    from densedino.models.vit import VisionTransformer

    spec = model_spec(name) if isinstance(name, str) else name
    if in_chans < 1:
        raise InputError(f"in_chans is {in_chans}; a model needs at least 1 input channel.")
    # Built on meta and then filled, so that nothing is initialised twice and nothing stays uninitialised unseen.
    with torch.device("meta"):
        model: VisionTransformer | ConvNeXt
        model = VisionTransformer(spec, in_chans=in_chans) if isinstance(spec, ViTSpec) else ConvNeXt(spec, in_chans)
    if dtype is not None:
        model = model.to(dtype)
    if device is None or torch.device(device).type != "meta":
        model = model.to_empty(device=device if device is not None else torch.get_default_device())
        model.init_weights()
    return model.eval()
