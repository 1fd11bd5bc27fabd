from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

import densedino as dd
from densedino.errors import InputError

if TYPE_CHECKING:
    from densedino.tasks.texts import TextReader

IMAGE = np.random.default_rng(0).integers(0, 255, (80, 120, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def reader() -> TextReader:
    return dd.load("debug_vit-txt", weights="random")


def test_labels_share_the_probability(reader: TextReader) -> None:
    (found,) = reader(IMAGE, ["roof", "tree", "solar panel"])
    assert found.names == ("roof", "tree", "solar panel") and found.probabilities.sum() == pytest.approx(1, abs=1e-5)


def test_a_label_is_the_mean_of_its_prompts(reader: TextReader) -> None:
    both = reader.embed_labels(["roof", "tree"])
    assert both.shape == (2, 64) and torch.allclose(both.norm(dim=-1), torch.ones(2), atol=1e-5)
    assert torch.allclose(reader.embed_labels(["tree"])[0], both[1], atol=1e-5)
    assert not torch.allclose(reader.embed_labels(["tree"], prompts="plain")[0], both[1], atol=1e-3)


def test_labels_that_stay_are_embedded_once(reader: TextReader, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    encode = reader._head.encode_text
    monkeypatch.setattr(reader._head, "encode_text", lambda rows: calls.append(len(rows)) or encode(rows))
    reader([IMAGE, IMAGE], ["car", "cat"], prompts="plain")
    reader.segment(IMAGE, ["car", "cat"], prompts="plain")
    assert calls == [2]
    reader(IMAGE, ["cat", "car"], prompts="plain")
    assert calls == [2, 2]


def test_each_pixel_gets_a_label(reader: TextReader) -> None:
    (found,) = reader.segment(IMAGE, ["roof", "tree"], prompts="plain")
    assert found.classes.shape == (80, 120) and found.classes.max() <= 1 and (found.confidence >= 0.5 - 1e-5).all()


def test_no_labels_and_no_sizes(reader: TextReader) -> None:
    with pytest.raises(InputError, match="no labels"):
        reader(IMAGE, [])
    with pytest.raises(InputError, match="has sizes of its own"):
        dd.load("debug_vit-txt", weights="random", resize=64)
