"""Owns the vision transformer backbone: pixels [B, C, H, W] to tokens, in the reference's vocabulary.

Parameter names are those of Meta's released checkpoints, so that such a file loads strictly as it is.
Token order: CLS, registers ("storage tokens"), patches row by row.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, overload

import torch
from torch import Tensor, nn

from densedino.errors import InputError
from densedino.models.layers import Block, LayerScale, MaskedBiasLinear
from densedino.models.rope import RopeEmbed

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from densedino.models.catalog import ViTSpec
    from densedino.models.draws import Draws

__all__ = ["VisionTransformer", "block_indices"]


def block_indices(n: int | Sequence[int], depth: int) -> list[int]:
    """Resolve `n` (the last n blocks, or indices of which negative ones count from the end) to block numbers.

    Raises:
        InputError: an index outside [-depth, depth), or n outside [1, depth].
    """
    if isinstance(n, int):
        if not 1 <= n <= depth:
            raise InputError(
                f"n={n}: the model has {depth} blocks; ask for 1 to {depth} of them, or a list of indices."
            )
        return list(range(depth - n, depth))
    indices = list(n)
    bad = [i for i in indices if not -depth <= i < depth]
    if bad or not indices:
        raise InputError(f"block indices {indices}: valid are {-depth} to {depth - 1}, at least one.")
    return [i % depth for i in indices]


class PatchEmbed(nn.Module):
    """One linear map of each patch's pixels."""

    def __init__(self, *, in_chans: int, embed_dim: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, D, h, w]."""
        out: Tensor = self.proj(x)
        return out


class VisionTransformer(nn.Module):
    """DINOv3's ViT (paper, section 3.2 and table 2)."""

    def __init__(self, spec: ViTSpec, *, in_chans: int = 3) -> None:
        super().__init__()
        self.spec = spec
        self.embed_dim = self.num_features = spec.embed_dim
        self.num_heads = spec.num_heads
        self.n_blocks = self.depth = spec.depth
        self.patch_size = self.stride = spec.patch_size
        self.num_register_tokens = self.n_storage_tokens = spec.num_register_tokens
        self.in_chans = in_chans

        self.patch_embed = PatchEmbed(in_chans=in_chans, embed_dim=spec.embed_dim, patch_size=spec.patch_size)
        self.cls_token = nn.Parameter(torch.empty(1, 1, spec.embed_dim))
        if spec.num_register_tokens:
            self.storage_tokens = nn.Parameter(torch.empty(1, spec.num_register_tokens, spec.embed_dim))
        self.mask_token = nn.Parameter(torch.empty(1, spec.embed_dim))
        self.rope_embed = RopeEmbed(spec.head_dim, base=spec.rope_base, num_prefix_tokens=1 + spec.num_register_tokens)
        self.blocks: Sequence[Block] = nn.ModuleList(  # type: ignore[assignment]
            Block(
                spec.embed_dim,
                num_heads=heads,
                head_dim=spec.head_dim,
                hidden_dim=hidden,
                ffn=spec.ffn,
                qkv_bias=spec.qkv_bias,
                norm_eps=spec.norm_eps,
            )
            for heads, hidden in spec.blocks
        )
        self.norm = nn.LayerNorm(spec.embed_dim, eps=spec.norm_eps)
        self.local_cls_norm = nn.LayerNorm(spec.embed_dim, eps=spec.norm_eps) if spec.local_cls_norm else None
        self.head = nn.Identity()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Fill every parameter and buffer anew, from PyTorch's global generator (paper's initialisation)."""
        nn.init.normal_(self.cls_token, std=0.02)
        if self.num_register_tokens:
            nn.init.normal_(self.storage_tokens, std=0.02)
        nn.init.zeros_(self.mask_token)
        self.rope_embed.reset_periods()
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
                if isinstance(module, MaskedBiasLinear):
                    module.reset_mask()
            elif isinstance(module, nn.LayerNorm | nn.Conv2d):
                module.reset_parameters()
            elif isinstance(module, LayerScale):
                nn.init.constant_(module.gamma, self.spec.layer_scale)

    def grid_size(self, x: Tensor) -> tuple[int, int]:
        """Patches down and across for an input [B, C, H, W].

        Raises:
            InputError: not an image batch, another number of channels, or H or W not a multiple of `patch_size`.
        """
        p = self.patch_size
        if not torch.compiler.is_compiling():  # an exported graph has these as its shape constraints
            if x.ndim != 4 or x.shape[1] != self.in_chans:
                raise InputError(f"input of shape {tuple(x.shape)}: this model takes [B, {self.in_chans}, H, W].")
            if x.shape[2] % p or x.shape[3] % p or not x.shape[2] or not x.shape[3]:
                raise InputError(
                    f"input of {x.shape[2]}×{x.shape[3]} pixels: height and width must be multiples of {p}. "
                    "Pad, crop or resize it, or use dd.load(...), which pads and says which patches are real."
                )
        return x.shape[2] // p, x.shape[3] // p

    def _embed(self, x: Tensor, masks: Tensor | None) -> Tensor:
        patches = self.patch_embed(x).flatten(2).transpose(1, 2)
        if torch.is_autocast_enabled(x.device.type):
            patches = patches.float()  # what the blocks add to stays in float32
        if masks is not None:
            patches = torch.where(masks.unsqueeze(-1), self.mask_token.to(patches.dtype), patches)
        prefix = [self.cls_token, self.storage_tokens] if self.num_register_tokens else [self.cls_token]
        return torch.cat([*(t.to(patches.dtype).expand(x.shape[0], -1, -1) for t in prefix), patches], dim=1)

    def _block_outputs(
        self, x: Tensor, masks: Tensor | None = None, draws: Draws | None = None, *, last_rows: Tensor | None = None
    ) -> Iterator[Tensor]:
        """Tokens [B, 1 + R + N, D] after each block, before the final norm; of the last only `last_rows`, if given."""
        height, width = self.grid_size(x)
        tokens = self._embed(x, masks)
        warps, kept = (draws.warps, draws.kept) if draws is not None else ((), ())
        rope = self.rope_embed(height, width, x.device, warp=warps[0] if warps else None)
        for number, block in enumerate(self.blocks):
            if number and len(warps) > 1:
                rope = self.rope_embed(height, width, x.device, warp=warps[number])
            rows = last_rows if number == self.depth - 1 else None
            tokens = block(tokens, rope, kept[2 * number : 2 * number + 2] or None, rows=rows)
            yield tokens

    def _features(self, x: Tensor, masks: Tensor | None, *, local: bool) -> dict[str, Tensor | None]:
        *_, prenorm = self._block_outputs(x, masks)
        first = 1 + self.num_register_tokens
        if local and self.training and self.local_cls_norm is not None:
            prefix, patches = self.local_cls_norm(prenorm[:, :first]), self.norm(prenorm[:, first:])
        else:
            normed = self.norm(prenorm)
            prefix, patches = normed[:, :first], normed[:, first:]
        return {
            "x_norm_clstoken": prefix[:, 0],
            "x_storage_tokens": prefix[:, 1:],
            "x_norm_patchtokens": patches,
            "x_prenorm": prenorm,
            "masks": masks,
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
        """What the losses read of the last block, after the final norm: CLS [B, D] and chosen patch tokens.

        Args:
            x: [B, C, H, W], crops of one size.
            masks: bool [B, N], N = h·w, True where the mask token replaces the patch.
            draws: stochastic depth and RoPE of this forward; none by default.
            local: these are local crops, whose CLS has a norm of its own where the specification says so.
            patches: [M] int64, rows of the B·N patch tokens; the tokens are then [M, D]. All of them, [B, N, D], for
                None.
        """
        norm = self.local_cls_norm if local and self.local_cls_norm is not None else self.norm
        first = 1 + self.num_register_tokens
        if patches is None:
            *_, prenorm = self._block_outputs(x, masks, draws)
            return norm(prenorm[:, 0]), self.norm(prenorm[:, first:])
        B, N = len(x), math.prod(self.grid_size(x))
        image, place = patches // N, patches % N
        rows = torch.cat([torch.arange(B, device=x.device) * (first + N), image * (first + N) + first + place])
        *_, prenorm = self._block_outputs(x, masks, draws, last_rows=rows)
        return norm(prenorm[:B]), self.norm(prenorm[B:])

    @overload
    def forward_features(self, x: Tensor, masks: Tensor | None = None) -> dict[str, Tensor | None]: ...
    @overload
    def forward_features(
        self, x: list[Tensor], masks: list[Tensor | None] | None = None
    ) -> list[dict[str, Tensor | None]]: ...
    def forward_features(
        self, x: Tensor | list[Tensor], masks: Tensor | list[Tensor | None] | None = None
    ) -> dict[str, Tensor | None] | list[dict[str, Tensor | None]]:
        """All tokens of the last block.

        Args:
            x: [B, C, H, W], or a list of such batches of different resolutions (training: global crops, then local).
            masks: bool [B, h * w], True where the mask token replaces the patch; a list for a list.

        Returns:
            `x_norm_clstoken` [B, D], `x_storage_tokens` [B, R, D] and `x_norm_patchtokens` [B, h * w, D] after the
            final norm, `x_prenorm` [B, 1 + R + h * w, D] before it, `masks` as given; a list of these for a list.
        """
        if isinstance(x, Tensor):
            if isinstance(masks, list):
                raise InputError("masks is a list, but x is one tensor; give one mask tensor or None.")
            return self._features(x, masks, local=False)
        if isinstance(masks, Tensor) or (masks is not None and len(masks) != len(x)):
            raise InputError(f"x is a list of {len(x)} batches; masks must be a list of as many (None for no mask).")
        per_batch = masks if masks is not None else [None] * len(x)
        return [self._features(xi, mi, local=i == 1) for i, (xi, mi) in enumerate(zip(x, per_batch, strict=True))]

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
        """Tokens of chosen blocks, in the order asked; no block after the last one asked is run.

        Args:
            x: [B, C, H, W].
            n: how many of the last blocks, or indices of blocks; negative ones count from the end.
            reshape: patches as [B, D, h, w] instead of [B, h * w, D].
            return_class_token: add the CLS token [B, D].
            return_extra_tokens: add the registers [B, R, D].
            norm: apply the model's final norm.

        Returns:
            For each block patches, or a tuple (patches[, cls][, registers]).

        Raises:
            InputError: an index that is no block, or an input that is no image batch.
        """
        wanted = block_indices(n, self.depth)
        height, width = self.grid_size(x)
        outputs: dict[int, tuple[Tensor, ...]] = {}
        for number, tokens in enumerate(self._block_outputs(x)):
            if number in wanted:
                tokens = self.norm(tokens) if norm else tokens
                patches = tokens[:, 1 + self.num_register_tokens :]
                if reshape:
                    patches = patches.transpose(1, 2).unflatten(2, (height, width)).contiguous()
                outputs[number] = (patches,)
                if return_class_token:
                    outputs[number] += (tokens[:, 0],)
                if return_extra_tokens:
                    outputs[number] += (tokens[:, 1 : 1 + self.num_register_tokens],)
            if number == max(wanted):
                break
        return tuple(outputs[i] if len(outputs[i]) > 1 else outputs[i][0] for i in wanted)

    def get_attention_maps(
        self, x: Tensor, *, n: int | Sequence[int] = 1, queries: slice = slice(None)
    ) -> tuple[Tensor, ...]:
        """Attention of chosen blocks, in the order asked: each [B, H, Q, T] (query, key), float32, rows summing to 1.

        T = 1 + R + h * w tokens: CLS, registers, patches.

        Args:
            x: [B, C, H, W].
            n: how many of the last blocks, or indices of blocks; negative ones count from the end.
            queries: which tokens look: all of them, or `slice(0, 1)` for CLS alone, which takes T times less memory.

        Raises:
            InputError: as `get_intermediate_layers`.
        """
        wanted = block_indices(n, self.depth)
        height, width = self.grid_size(x)
        tokens = self._embed(x, None)
        rope = self.rope_embed(height, width, x.device)
        maps: dict[int, Tensor] = {}
        for number, block in enumerate(self.blocks[: max(wanted) + 1]):
            if number in wanted:
                maps[number] = block.attn.weights(block.norm1(tokens), rope, queries)
            tokens = block(tokens, rope)
        return tuple(maps[i] for i in wanted)

    @overload
    def forward(self, x: Tensor, masks: Tensor | None = None, *, is_training: bool = False) -> Tensor: ...
    @overload
    def forward(
        self, x: list[Tensor], masks: list[Tensor | None] | None = None, *, is_training: bool = True
    ) -> list[dict[str, Tensor | None]]: ...
    def forward(
        self,
        x: Tensor | list[Tensor],
        masks: Tensor | list[Tensor | None] | None = None,
        *,
        is_training: bool = False,
    ) -> Tensor | dict[str, Tensor | None] | list[dict[str, Tensor | None]]:
        """The CLS token [B, D] after the final norm; with `is_training`, what `forward_features` returns."""
        features = self.forward_features(x, masks)  # type: ignore[arg-type]
        if is_training or not isinstance(features, dict):
            return features
        cls: Tensor = self.head(features["x_norm_clstoken"])
        return cls
