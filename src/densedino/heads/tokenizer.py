"""Owns the text tokenizer of CLIP (Radford et al. 2021), which dino.txt shares, and its prompts; works offline.

Byte pairs (Sennrich et al. 2016) over the bytes of UTF-8, of text that was repaired, unescaped and put in lower case.
The vocabulary is CLIP's own file, under the MIT License, in the folder `clip`.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import html
import importlib.resources
import itertools
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from densedino.errors import InputError, require

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["PROMPTS", "Tokenizer", "prompts_of"]

VOCABULARY_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
_MERGES = 49152 - 256 - 2
_START, _END = "<|startoftext|>", "<|endoftext|>"
_WORD_END = "</w>"
_PARTS = rf"{_START}|{_END}|'s|'t|'re|'ve|'m|'ll|'d|\p{{L}}+|\p{{N}}|[^\s\p{{L}}\p{{N}}]+".replace(
    "|>", r"\|>"
).replace("<|", r"<\|")


def _packaged(name: str) -> bytes:
    return (importlib.resources.files("densedino.heads") / "clip" / name).read_bytes()


@functools.cache
def _templates() -> tuple[str, ...]:
    return tuple(_packaged("templates.txt").decode().splitlines())


PROMPTS = ("imagenet", "plain")


def prompts_of(label: str, *, prompts: str = "imagenet") -> list[str]:
    """Sentences about `label`: CLIP's 80 for ImageNet, or the label alone.

    Raises:
        InputError: an empty label, or no such prompts.
    """
    if not label.strip():
        raise InputError('a label is empty; give names, such as "roof, tree, solar panel".')
    if prompts not in PROMPTS:
        raise InputError(f"prompts {prompts!r}: valid are {', '.join(PROMPTS)}.")
    return [label] if prompts == "plain" else [template.replace("{}", label) for template in _templates()]


@functools.cache
def _symbols() -> dict[int, str]:
    """A printable character for every byte: itself where it is one, else the next free one from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


class Tokenizer:
    """Text to numbers and back."""

    def __init__(self, vocabulary: str | os.PathLike[str] | None = None, *, context: int = 77) -> None:
        """Read the vocabulary.

        Args:
            vocabulary: a copy of bpe_simple_vocab_16e6.txt.gz; the package's own if not given.
            context: numbers per text.

        Raises:
            InputError: the file is not there, or another one.
            MissingExtraError: ftfy and regex are not installed.
        """
        data = _packaged("bpe_simple_vocab_16e6.txt.gz") if vocabulary is None else _read(Path(vocabulary))
        lines = gzip.decompress(data).decode("utf-8").split("\n")[1 : _MERGES + 1]
        merges = [tuple(line.split()) for line in lines]
        letters = list(_symbols().values())
        tokens = [*letters, *(letter + _WORD_END for letter in letters), *("".join(pair) for pair in merges)]
        self.context = context
        self.numbers = {token: number for number, token in enumerate([*tokens, _START, _END])}
        self.start, self.end = self.numbers[_START], self.numbers[_END]
        self._tokens = list(self.numbers)
        self._ranks = {pair: rank for rank, pair in enumerate(merges)}
        self._ftfy = require("ftfy", extra="text", purpose="The text tokenizer")
        regex = require("regex", extra="text", purpose="The text tokenizer")
        self._pattern = regex.compile(_PARTS, regex.IGNORECASE)
        self._pairs = functools.lru_cache(maxsize=1 << 16)(self._merged)

    def __call__(self, texts: str | Sequence[str]) -> Tensor:
        """One text or several to rows of `context` numbers: start, the text's own, end, zeros. int64 [T, context].

        A text that is too long is cut, and still ends with the end token.
        """
        rows = torch.zeros(1 if isinstance(texts, str) else len(texts), self.context, dtype=torch.int64)
        for row, text in zip(rows, [texts] if isinstance(texts, str) else texts, strict=True):
            numbers = [self.start, *self.encode(text), self.end][: self.context]
            row[: len(numbers)] = torch.tensor(numbers)
            row[len(numbers) - 1] = self.end
        return rows

    tokenize = __call__

    def encode(self, text: str) -> list[int]:
        """The numbers of a text, without start and end."""
        text = html.unescape(html.unescape(self._ftfy.fix_text(text)))
        text = " ".join(text.split()).lower()
        return [self.numbers[token] for part in self._pattern.findall(text) for token in self._pairs(part)]

    def decode(self, numbers: Sequence[int]) -> str:
        """The text of numbers, each word followed by a space."""
        text = "".join(self._tokens[number] for number in numbers)
        back = {symbol: byte for byte, symbol in _symbols().items()}
        ends = text.replace(_WORD_END, " ")
        data = b"".join(bytes([back[c]]) if c in back else c.encode() for c in ends)
        return data.decode("utf-8", errors="replace")

    def _merged(self, part: str) -> tuple[str, ...]:
        """The tokens of one word: neighbours are joined, the pair that stands first in the vocabulary first."""
        if part in (_START, _END):
            return (part,)
        symbols = _symbols()
        word = [symbols[byte] for byte in part.encode("utf-8")]
        word[-1] += _WORD_END
        while len(word) > 1:
            last = len(self._ranks)
            rank, best = min((self._ranks.get(pair, last), pair) for pair in itertools.pairwise(word))
            if rank == last:
                break
            joined: list[str] = []
            i = 0
            while i < len(word):
                if tuple(word[i : i + 2]) == best:
                    joined.append("".join(best))
                    i += 2
                else:
                    joined.append(word[i])
                    i += 1
            word = joined
        return tuple(word)


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise InputError(
            f"no vocabulary file {path}. Leave it out: densedino has CLIP's own; or give a copy of "
            "bpe_simple_vocab_16e6.txt.gz."
        )
    data = path.read_bytes()
    if (digest := hashlib.sha256(data).hexdigest()) != VOCABULARY_SHA256:
        raise InputError(
            f"{path} is not CLIP's bpe_simple_vocab_16e6.txt.gz: its SHA-256 is {digest[:16]}…, not "
            f"{VOCABULARY_SHA256[:16]}…. Leave it out: densedino has that file."
        )
    return data
