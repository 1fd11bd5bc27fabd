from __future__ import annotations

import gzip
import json
import random
import re
from typing import TYPE_CHECKING

import pytest
import torch

from densedino.errors import InputError
from densedino.heads.tokenizer import PROMPTS, Tokenizer, _packaged, prompts_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from heads.conftest import Golden


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer()


def test_numbers_and_rows_are_golden(
    tokenizer: Tokenizer, golden: Callable[[str], Golden], specification: Path
) -> None:
    rows = golden("tokenizer")["padded77"]
    facts = json.loads((specification / "golden_tokenizer.json").read_text())
    assert len(tokenizer.numbers) == facts["vocab_size"]
    assert (tokenizer.start, tokenizer.end) == (facts["sot"], facts["eot"])
    for text, ids, decoded in zip(facts["texts"], facts["ids"], facts["decoded"], strict=True):
        assert tokenizer.encode(text) == ids, text
        assert tokenizer.decode(ids) == decoded
    assert torch.equal(tokenizer(facts["texts"]), rows)


SCRIPTS = (
    (0x20, 0x7F),
    (0xC0, 0x250),
    (0x3B1, 0x3C9),
    (0x410, 0x450),
    (0x5D0, 0x5EB),
    (0x621, 0x64B),
    (0x904, 0x93A),
    (0xE01, 0xE2F),
    (0x3041, 0x3097),
    (0x4E00, 0x5000),
    (0xAC00, 0xAD00),
    (0x1F600, 0x1F640),
    (0x10D0, 0x10F0),
)


def test_1000_strings_of_many_scripts_are_tokenized_as_by_transformers(tokenizer: Tokenizer) -> None:
    """Its CLIP tokenizer (Apache-2.0), which does not repair text: so of characters that need none."""
    from transformers import CLIPTokenizer

    lines = gzip.decompress(_packaged("bpe_simple_vocab_16e6.txt.gz")).decode().split("\n")[1:48895]
    theirs = CLIPTokenizer(vocab=tokenizer.numbers, merges=[tuple(line.split()) for line in lines])
    draw = random.Random(0)
    for _ in range(1000):
        scripts = draw.sample(SCRIPTS, draw.randint(1, 4))
        letters = [chr(draw.randrange(*draw.choice(scripts))) for _ in range(draw.randint(1, 40))]
        text = "".join(" " if draw.random() < 0.15 else letter for letter in letters)
        text = re.sub(r"[&<>|]", "", text)
        if tokenizer._ftfy.fix_text(text) != text:
            continue
        assert tokenizer.encode(text) == theirs(text, add_special_tokens=False)["input_ids"], text


def test_a_long_text_is_cut_and_ends(tokenizer: Tokenizer) -> None:
    (row,) = tokenizer("tree " * 200)
    assert row.shape == (77,) and row[0] == tokenizer.start and row[-1] == tokenizer.end
    assert (row[1:-1] == row[1]).all()


def test_another_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no vocabulary file"):
        Tokenizer(tmp_path / "no.gz")
    (tmp_path / "other.gz").write_bytes(gzip.compress(b"a b\n"))
    with pytest.raises(InputError, match=r"is not CLIP's.*SHA-256"):
        Tokenizer(tmp_path / "other.gz")
    (tmp_path / "same.gz").write_bytes(_packaged("bpe_simple_vocab_16e6.txt.gz"))
    assert Tokenizer(tmp_path / "same.gz", context=5)("a tree").tolist() == [[49406, 320, 2677, 49407, 0]]


def test_prompts() -> None:
    sentences = prompts_of("solar panel")
    assert len(sentences) == len(set(sentences)) == 80 and all("solar panel" in s and "{" not in s for s in sentences)
    assert prompts_of("roof", prompts="plain") == ["roof"] and set(PROMPTS) == {"imagenet", "plain"}
    with pytest.raises(InputError, match="a label is empty"):
        prompts_of(" ")
    with pytest.raises(InputError, match="valid are imagenet, plain"):
        prompts_of("roof", prompts="no")
