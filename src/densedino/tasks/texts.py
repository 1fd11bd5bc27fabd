"""Owns zero-shot reading of pictures with dino.txt: how like texts they are, as wholes and at each pixel."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F

from densedino.errors import InputError
from densedino.heads.configs import DinoTxtConfig
from densedino.heads.tokenizer import Tokenizer, prompts_of
from densedino.tasks.classes import Classes, centre_crop
from densedino.tasks.headed import Headed, images_of
from densedino.tasks.masks import ClassMap
from densedino.tasks.sliding import classes_at, slide

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from torch import Tensor

    from densedino.heads.dinotxt import DinoTxt

__all__ = ["TextReader"]

_SHORT_SIDE, _CROP = 256, 224
_MAP_SIDE, _WINDOW, _STRIDE = 512, 384, 192
_AT_ONCE = 64  # texts


@dataclass(frozen=True, eq=False)
class TextReader:
    """`dd.load("vitl16-dinotxt", …)`."""

    headed: Headed
    vocabulary: str | os.PathLike[str] | None = None

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """CLIP's."""
        config = self.headed.spec.config
        assert isinstance(config, DinoTxtConfig)
        return Tokenizer(self.vocabulary, context=config.context)

    @property
    def _head(self) -> DinoTxt:
        return cast("DinoTxt", self.headed.head)

    def embed_labels(self, labels: Sequence[str], *, prompts: str = "imagenet") -> Tensor:
        """One normalised vector [2 D] per label: the mean of its prompts' normalised embeddings."""
        if not labels:
            raise InputError('no labels; give names, such as ["roof", "tree", "solar panel"].')
        asked = (tuple(labels), prompts)
        if asked not in self._known:  # the text tower is the costly part, and most often the labels stay
            vectors = self._embedded(labels, prompts)
            self._known.clear()
            self._known[asked] = vectors
            return vectors
        return self._known[asked]

    @functools.cached_property
    def _known(self) -> dict[tuple[tuple[str, ...], str], Tensor]:
        """What was asked last, and its vectors."""
        return {}

    def _embedded(self, labels: Sequence[str], prompts: str) -> Tensor:
        sentences = [prompts_of(label, prompts=prompts) for label in labels]
        flat = [sentence for group in sentences for sentence in group]
        vectors = F.normalize(self._embed(flat), dim=-1)
        return F.normalize(torch.stack([part.mean(0) for part in vectors.split([len(s) for s in sentences])]), dim=-1)

    def _embed(self, texts: Sequence[str]) -> Tensor:
        rows = self.tokenizer(list(texts)).to(self.headed.engine.device)
        with self.headed.lock, torch.no_grad():
            return torch.cat([self._head.encode_text(part) for part in rows.split(_AT_ONCE)])

    def embed_images(self, images: Any) -> Tensor:
        """Normalised vectors [B, 2 D] of images: 256 pixels on the short side, the 224 in the middle."""
        vectors = []
        for image in images_of(images):
            pixels, _ = self.headed.pixels_of(image, resize=_SHORT_SIDE, interpolation="bicubic")
            vectors.append(self._encode(centre_crop(pixels, _CROP)[None])[0])
        return F.normalize(torch.cat(vectors), dim=-1)

    def _encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        with self.headed.lock, torch.no_grad():
            return self._head.encode_image(pixels, self.headed.tokens_of)

    def __call__(self, images: Any, labels: Sequence[str], *, prompts: str = "imagenet") -> list[Classes]:
        """Which of `labels` each image is, with probabilities among them.

        Args:
            images: one or several, each as `dd.load(…)` of a backbone takes it.
            labels: names, such as "roof".
            prompts: imagenet (CLIP's 80 sentences per label) or plain (the label itself).
        """
        texts = self.embed_labels(labels, prompts=prompts)
        likeness = self._head.logit_scale.exp() * self.embed_images(images) @ texts.T
        return [Classes(row.softmax(-1).cpu(), tuple(labels)) for row in likeness]

    def segment(self, images: Any, labels: Sequence[str], *, prompts: str = "imagenet") -> list[ClassMap]:
        """Which of `labels` is at each pixel: 512 pixels on the short side, in windows of 384, 192 apart."""
        texts = self.embed_labels(labels, prompts=prompts)
        texts = F.normalize(texts[:, texts.shape[1] // 2 :], dim=-1)  # the half that is aligned with patches
        maps = []
        for image in images_of(images):
            pixels, size = self.headed.pixels_of(image, resize=_MAP_SIDE, interpolation="bicubic")
            values = slide(pixels[None], functools.partial(self._window, texts=texts), crop=_WINDOW, stride=_STRIDE)
            classes, best = classes_at(values, size)
            maps.append(ClassMap(classes, best, tuple(labels)))
        return maps

    def _window(self, pixels: Tensor, *, texts: Tensor) -> Tensor:
        """Shares of the labels [1, labels, H, W]; a window that is no multiple of 16 is stretched to one."""
        H, W = pixels.shape[2:]
        if H % 16 or W % 16:
            pixels = F.interpolate(pixels, size=(H + -H % 16, W + -W % 16), mode="bicubic")
        _, patches = self._encode(pixels)
        cosines = (F.normalize(patches, dim=-1) @ texts.T).permute(0, 3, 1, 2)
        return F.interpolate(cosines, size=(H, W), mode="bilinear").softmax(1)
