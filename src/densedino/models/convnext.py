"""Owns the ConvNeXt backbone (Liu et al. 2022) as DINOv3 distils it (paper, section 6): CLS is the last map's mean.

Parameter names are those of Meta's released checkpoints, less the second copy of the final norm (`norms.3`).
Maps are kept in channels-last memory, so that norms and pointwise layers read contiguous channels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from densedino.errors import InputError
from densedino.models.layers import Linear, linear_gelu, residual
from densedino.models.vit import block_indices

if TYPE_CHECKING:
    from collections.abc import Sequence

    from densedino.models.catalog import ConvNeXtSpec
    from densedino.models.draws import Draws, Kept

__all__ = ["ConvNeXt"]


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of a map [B, C, H, W]."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (nn.LayerNorm's name)
        """[B, C, H, W] -> [B, C, H, W]."""
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    """7×7 depthwise convolution, norm, pointwise MLP of four times the width, layer scale, residual."""

    def __init__(self, dim: int, *, norm_eps: float) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, kernel_size=7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=norm_eps)
        self.pwconv1 = Linear(dim, 4 * dim)
        self.pwconv2 = Linear(4 * dim, dim)
        self.gamma = nn.Parameter(torch.empty(dim))

    def _branch(self, x: Tensor) -> Tensor:
        branch = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        branch = self.pwconv2(linear_gelu(self.pwconv1, branch))
        return (branch * self.gamma).permute(0, 3, 1, 2)

    def forward(self, x: Tensor, kept: Kept | None = None) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]; `kept`: stochastic depth."""
        return residual(x, self._branch, kept)


class ConvNeXt(nn.Module):
    """Four stages of stride 4, 8, 16 and 32; a "block" of `get_intermediate_layers` is a stage."""

    def __init__(self, spec: ConvNeXtSpec, in_chans: int = 3) -> None:
        super().__init__()
        self.spec = spec
        self.embed_dim = self.num_features = spec.embed_dim
        self.embed_dims = spec.dims
        self.n_blocks = self.depth = 4
        self.stride = spec.stride
        self.num_register_tokens = self.n_storage_tokens = 0
        self.in_chans = in_chans

        widths = (in_chans, *spec.dims)
        self.downsample_layers = nn.ModuleList()
        self.stages = nn.ModuleList()
        for i, depth in enumerate(spec.depths):
            before, after = widths[i], widths[i + 1]
            if i == 0:
                layers: list[nn.Module] = [
                    nn.Conv2d(before, after, kernel_size=4, stride=4),
                    ChannelNorm(after, eps=spec.norm_eps),
                ]
            else:
                layers = [
                    ChannelNorm(before, eps=spec.norm_eps),
                    nn.Conv2d(before, after, kernel_size=2, stride=2),
                ]
            self.downsample_layers.append(nn.Sequential(*layers))
            self.stages.append(nn.Sequential(*(ConvNeXtBlock(after, norm_eps=spec.norm_eps) for _ in range(depth))))
        self.norm = nn.LayerNorm(spec.embed_dim, eps=spec.norm_eps)
        self.head = nn.Identity()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Fill every parameter anew, from PyTorch's global generator (ConvNeXt paper's initialisation)."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, ConvNeXtBlock):
                nn.init.constant_(module.gamma, self.spec.layer_scale)

    def _check(self, x: Tensor) -> None:
        if torch.compiler.is_compiling():
            return
        if x.ndim != 4 or x.shape[1] != self.in_chans:
            raise InputError(f"input of shape {tuple(x.shape)}: this model takes [B, {self.in_chans}, H, W].")
        if x.shape[2] % self.stride or x.shape[3] % self.stride or not x.shape[2] or not x.shape[3]:
            raise InputError(
                f"input of {x.shape[2]}×{x.shape[3]} pixels: height and width must be multiples of {self.stride}. "
                "Pad, crop or resize it, or use dd.load(...), which pads and says which patches are real."
            )

    def _stage_outputs(self, x: Tensor, last: int = 3, draws: Draws | None = None) -> list[Tensor]:
        """Maps [B, C_i, H / (4 * 2**i), W / (4 * 2**i)] of stages 0 to `last`, not normalised."""
        self._check(x)
        x = x.contiguous(memory_format=torch.channels_last)
        maps = []
        kept = iter(draws.kept if draws is not None and draws.kept else [None] * sum(self.spec.depths))
        for downsample, stage in zip(self.downsample_layers[: last + 1], self.stages[: last + 1], strict=True):
            x = downsample(x)
            for block in stage.children():
                x = block(x, next(kept))
            maps.append(x)
        return maps

    def forward_features(
        self, x: Tensor | list[Tensor], masks: Tensor | list[Tensor | None] | None = None
    ) -> dict[str, Tensor | None] | list[dict[str, Tensor | None]]:
        """Tokens of the last stage; `masks` are passed through (a convolution cannot leave patches out).

        Args:
            x: [B, C, H, W], or a list of such batches of different resolutions.
            masks: returned as given.

        Returns:
            `x_norm_clstoken` [B, D], `x_storage_tokens` [B, 0, D] and `x_norm_patchtokens` [B, h * w, D] after the
            final norm, `x_prenorm` [B, h * w, D] before it, `masks`; a list of these for a list.
        """
        if isinstance(x, list):
            per_batch = masks if isinstance(masks, list) else [None] * len(x)
            return [self.forward_features(xi, mi) for xi, mi in zip(x, per_batch, strict=True)]  # type: ignore[misc]
        prenorm = self._stage_outputs(x)[-1].flatten(2).transpose(1, 2)
        normed = self.norm(torch.cat([prenorm.mean(dim=1, keepdim=True), prenorm], dim=1))
        return {
            "x_norm_clstoken": normed[:, 0],
            "x_storage_tokens": normed[:, 1:1],
            "x_norm_patchtokens": normed[:, 1:],
            "x_prenorm": prenorm,
            "masks": masks if isinstance(masks, Tensor) else None,
        }

    def training_features(
        self,
        x: Tensor,
        *,
        masks: Tensor | None = None,
        draws: Draws | None = None,
        local: bool = False,
        patches: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """What `VisionTransformer.training_features` gives; `masks` and `local` make no difference here."""
        prenorm = self._stage_outputs(x, draws=draws)[-1].flatten(2).transpose(1, 2)
        chosen = prenorm if patches is None else prenorm.flatten(0, 1)[patches]
        return self.norm(prenorm.mean(dim=1)), self.norm(chosen)

    def get_intermediate_layers(
        self,
        x: Tensor,
        *,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_class_token: bool = False,
        return_extra_tokens: bool = False,
        norm: bool = True,
    ) -> tuple[Tensor | tuple[Tensor, ...], ...]:
        """Maps of chosen stages, in the order asked; each stage has its own width and stride.

        Args:
            x: [B, C, H, W].
            n: how many of the last stages, or indices of stages; negative ones count from the end.
            reshape: [B, C_i, h_i, w_i] instead of [B, h_i * w_i, C_i].
            return_class_token: add the mean of the map [B, C_i].
            return_extra_tokens: add [B, 0, C_i] (there are no registers), for the same code as with a ViT.
            norm: apply the final norm to the last stage; earlier stages have none.

        Raises:
            InputError: an index that is no stage, or an input that is no image batch.
        """
        wanted = block_indices(n, self.depth)
        maps = self._stage_outputs(x, last=max(wanted))
        outputs: list[Tensor | tuple[Tensor, ...]] = []
        for i in wanted:
            height, width = maps[i].shape[2:]
            tokens = maps[i].flatten(2).transpose(1, 2)
            cls = tokens.mean(dim=1)
            if norm and i == self.depth - 1:
                tokens, cls = self.norm(tokens), self.norm(cls)
            patches = tokens.transpose(1, 2).unflatten(2, (height, width)).contiguous() if reshape else tokens
            extra = (*([cls] if return_class_token else []), *([tokens[:, :0]] if return_extra_tokens else []))
            outputs.append((patches, *extra) if extra else patches)
        return tuple(outputs)

    def forward(
        self, x: Tensor | list[Tensor], masks: Tensor | list[Tensor | None] | None = None, *, is_training: bool = False
    ) -> Tensor | dict[str, Tensor | None] | list[dict[str, Tensor | None]]:
        """The CLS token [B, D] after the final norm; with `is_training`, what `forward_features` returns."""
        features = self.forward_features(x, masks)
        if is_training or isinstance(features, list):
            return features
        cls: Tensor = self.head(features["x_norm_clstoken"])
        return cls
