from __future__ import annotations

import pytest
import torch

from densedino.errors import StateDictError
from densedino.weights.kept import pack_kept, unpack_kept


def test_round_trip_is_bit_equal():
    tensors = {"mask_token": torch.randn(1, 8), "periods": torch.rand(4).bfloat16(), "view": torch.randn(4, 6).t()}
    metadata = pack_kept(tensors)
    back = unpack_kept(metadata)
    assert all(isinstance(value, str) for value in metadata.values())
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[key], value) and back[key].dtype == value.dtype for key, value in tensors.items())


def test_nothing_to_keep_leaves_no_entry():
    assert pack_kept({}) == {}
    assert unpack_kept({"format": "pt"}) == {}


@pytest.mark.parametrize("text", ["!!", "AAAA", "////////////////"])
def test_damaged_entry_is_an_error(text):
    with pytest.raises(StateDictError, match="damaged"):
        unpack_kept({"densedino.kept": text})
