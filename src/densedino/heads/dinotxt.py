"""Owns dino.txt (Jose et al. 2024): a vision head on a frozen backbone, and the text transformer it is aligned with."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from densedino.heads.attention import learned
from densedino.models.layers import GatedMlp, LayerScale, Mlp

if TYPE_CHECKING:
    from densedino.heads.configs import DinoTxtConfig
    from densedino.heads.tapping import TokensOf

__all__ = ["DinoTxt"]


class _SelfAttention(nn.Module):
    """Of tokens without positions; queries, keys and values have no bias."""

    def __init__(self, dim: int, *, heads: int, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.proj(out.transpose(1, 2).flatten(2))


class _VisionBlock(nn.Module):
    def __init__(self, dim: int, config: DinoTxtConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = _SelfAttention(dim, heads=config.vision_heads)
        self.ls1 = LayerScale(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = GatedMlp(dim, config.vision_hidden)
        self.ls2 = LayerScale(dim)
        nn.init.constant_(self.ls1.gamma, 1e-5)
        nn.init.constant_(self.ls2.gamma, 1e-5)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class _VisionHead(nn.Module):
    def __init__(self, dim: int, config: DinoTxtConfig) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_VisionBlock(dim, config) for _ in range(config.vision_blocks))
        self.ln_final = nn.LayerNorm(dim)

    def forward(self, tokens: Tensor) -> Tensor:
        for block in self.blocks:
            tokens = block(tokens)
        return self.ln_final(tokens)


class _VisionModel(nn.Module):
    def __init__(self, dim: int, config: DinoTxtConfig) -> None:
        super().__init__()
        self.head = _VisionHead(dim, config)


class _TextBlock(nn.Module):
    def __init__(self, config: DinoTxtConfig) -> None:
        super().__init__()
        dim = config.text_dim
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = _SelfAttention(dim, heads=config.text_heads, causal=True)
        self.ffn_norm = nn.LayerNorm(dim)
        self.feed_forward = Mlp(dim, config.text_hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.ffn_norm(x))


class _TextTransformer(nn.Module):
    def __init__(self, config: DinoTxtConfig) -> None:
        super().__init__()
        self.token_embedding = learned(config.vocabulary, config.text_dim, deviation=0.02)
        self.positional_embedding = nn.Parameter(torch.empty(config.context, config.text_dim))
        self.blocks = nn.ModuleList(_TextBlock(config) for _ in range(config.text_blocks))
        self.ln_final = nn.LayerNorm(config.text_dim)
        nn.init.uniform_(self.positional_embedding, -0.02, 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.ln_final(x)


class _TextHead(nn.Module):
    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.linear_projection = nn.Linear(dim, out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_projection(x)


class _TextModel(nn.Module):
    def __init__(self, dim: int, config: DinoTxtConfig) -> None:
        super().__init__()
        self.backbone = _TextTransformer(config)
        self.head = _TextHead(config.text_dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """The embedding at the end token, which has the largest number: [B, N] int64 to [B, dim]."""
        x = self.head(self.backbone(tokens))
        return x[torch.arange(len(x), device=x.device), tokens.argmax(dim=-1)]


class DinoTxt(nn.Module):
    """Images and texts in one space, of twice the backbone's width: CLS, and the mean patch."""

    def __init__(self, dim: int, config: DinoTxtConfig) -> None:
        super().__init__()
        self.visual_model = _VisionModel(dim, config)
        self.text_model = _TextModel(2 * dim, config)
        self.logit_scale = nn.Parameter(torch.tensor([-math.log(0.07)]))

    def forward(self, image: Tensor, text: Tensor, tokens_of: TokensOf) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Both embeddings, normalised, exp(logit_scale), and the patch tokens after the vision head [B, N, D].

        Args:
            image: [B, 3, H, W], normalised.
            text: [T, context] int64, of `Tokenizer`.
            tokens_of: of the backbone.
        """
        embedding, patches = self.encode_image(image, tokens_of)
        return (
            F.normalize(embedding, dim=-1),
            F.normalize(self.encode_text(text), dim=-1),
            self.logit_scale.exp(),
            patches.flatten(1, 2),
        )

    def encode_image(self, image: Tensor, tokens_of: TokensOf) -> tuple[Tensor, Tensor]:
        """The image's embedding [B, 2 D], and patches [B, h, w, D] that texts' second half is compared with."""
        (tap,) = tokens_of(image)
        grid = (tap.patches.shape[1], tap.patches.shape[2])
        tokens = torch.cat([tap.cls[:, None], tap.registers, tap.patches.flatten(1, 2)], dim=1)
        tokens = self.visual_model.head(tokens)
        patches = tokens[:, 1 + tap.registers.shape[1] :]
        return torch.cat([tokens[:, 0], patches.mean(dim=1)], dim=-1), patches.unflatten(1, grid)

    def encode_text(self, text: Tensor) -> Tensor:
        """Texts' embeddings: [T, context] int64 to [T, 2 D]."""
        return self.text_model(text)
