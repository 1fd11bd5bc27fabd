from __future__ import annotations

import io
from multiprocessing.reduction import ForkingPickler

import pytest
from hypothesis import given
from hypothesis import strategies as st

from densedino.pretrain.packed import PackedText


@given(st.lists(st.text()))
def test_texts_come_back(texts: list[str]) -> None:
    texts = [text.encode("utf-8", "replace").decode() for text in texts]
    packed = PackedText(texts)
    assert list(packed) == texts and len(packed) == len(texts)
    assert list(PackedText.of(packed.data.numpy(), packed.ends.numpy())) == texts


@given(st.lists(st.lists(st.text(alphabet="aü/")), min_size=1))
def test_lists_are_put_one_after_another(lists: list[list[str]]) -> None:
    whole = PackedText.concatenated([PackedText(texts) for texts in lists])
    assert list(whole) == [text for texts in lists for text in texts]


def test_names_that_are_no_utf8_come_back() -> None:
    name = b"caf\xe9.jpg".decode("utf-8", "surrogateescape")
    packed = PackedText(["", name, "ü"])
    assert packed[1] == packed[-2] == name
    with pytest.raises(IndexError, match="3 of 3"):
        packed[3]


def test_worker_processes_share_it() -> None:
    packed = PackedText(f"folder/{i:09d}.jpg" for i in range(100_000))
    written = io.BytesIO()
    ForkingPickler(written).dump(packed)
    assert len(written.getvalue()) < 10_000, "1.9 MB of names lie in shared memory"
