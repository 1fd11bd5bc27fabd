from __future__ import annotations

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from densedino.errors import InputError
from densedino.weights.card import WeightsCard

_TEXT = st.text(max_size=20)
_FLOATS = st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=4).map(tuple)
_CARDS = st.builds(
    WeightsCard,
    name=_TEXT,
    model=_TEXT,
    source=_TEXT,
    sha256=_TEXT,
    mean=_FLOATS,
    std=_FLOATS,
    in_chans=st.integers(1, 20),
    licence=_TEXT,
    licence_url=_TEXT,
    data=_TEXT,
    dialect=_TEXT,
    untrained=st.booleans(),
    dropped=st.lists(st.tuples(_TEXT, _TEXT), max_size=3).map(tuple),
    notes=st.lists(_TEXT, max_size=3).map(tuple),
)


@given(card=_CARDS)
def test_survives_json(card):
    assert WeightsCard.from_dict(json.loads(json.dumps(card.to_dict()))) == card


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": None}, "without name"),
        ({"colour": "red"}, "unknown fields colour"),
        ({"mean": ["red"]}, "malformed"),
        ({"dropped": [["only one"]]}, "malformed"),
    ],
)
def test_refuses_what_is_no_card(change, words):
    values = {**_example().to_dict(), **change}
    values = {key: value for key, value in values.items() if value is not None}
    with pytest.raises(InputError, match=words):
        WeightsCard.from_dict(values)


def test_refuses_what_is_no_mapping():
    with pytest.raises(InputError, match="mapping"):
        WeightsCard.from_dict([1, 2])


def test_imports_no_torch():
    code = "import sys, densedino.weights.card, densedino.weights.sources; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def _example():
    return WeightsCard(
        name="vits16",
        model="vits16",
        source="x.pth",
        sha256="0",
        mean=(0.5,),
        std=(0.5,),
        in_chans=1,
        licence="x",
        licence_url="",
        data="unknown",
        dialect="meta",
        untrained=False,
    )
