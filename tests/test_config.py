from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from densedino.config import from_dict, to_dict
from densedino.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Cosine:
    base: float
    steps: int = 10

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise InputError(f"steps is {self.steps}; it must be 0 or more.")


@dataclass(frozen=True, kw_only=True)
class Constant:
    value: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Head:
    width: int = 8
    scale: tuple[float, float] = (0.1, 0.5)


@dataclass(frozen=True, kw_only=True)
class Config:
    name: str
    head: Head = Head()
    lr: Cosine | Constant = Constant()
    stages: tuple[Cosine | Constant, ...] = ()
    data: Path | None = None
    mode: Literal["released", "paper"] = "released"
    flip: bool = True
    limit: int | Literal["auto"] | None = None
    weights: dict[str, float] = field(default_factory=dict)
    extra: Head | None = None


numbers = st.floats(allow_nan=False, allow_infinity=False)
cosines = st.builds(Cosine, base=numbers, steps=st.integers(0))
schedules = cosines | st.builds(Constant, value=numbers)
heads = st.builds(Head, width=st.integers(), scale=st.tuples(numbers, numbers))
configs = st.builds(
    Config,
    name=st.text(),
    head=heads,
    lr=schedules,
    stages=st.lists(schedules, max_size=3).map(tuple),
    data=st.none() | st.sampled_from([Path("a/b"), Path("/c")]),
    mode=st.sampled_from(["released", "paper"]),
    flip=st.booleans(),
    limit=st.none() | st.integers() | st.just("auto"),
    weights=st.dictionaries(st.text(), numbers, max_size=3),
    extra=st.none() | heads,
)


@given(configs)
def test_json_holds_a_whole_configuration(config):
    assert from_dict(Config, json.loads(json.dumps(to_dict(config)))) == config


def test_what_is_absent_gets_its_default_and_integers_serve_as_floats():
    config = from_dict(Config, {"name": "x", "head": {"width": 4}, "lr": {"kind": "Cosine", "base": 1}})
    assert config == Config(name="x", head=Head(width=4), lr=Cosine(base=1.0))
    assert type(config.lr.base) is float


def test_all_mistakes_are_reported_at_once_with_place_and_nearest_name():
    data = {
        "head": {"widht": 3, "scale": [0.1]},
        "lr": {"kind": "Cosin"},
        "stages": [{"kind": "Cosine", "base": "1"}, {"kind": "Cosine", "base": 1.0, "steps": -1}, 3],
        "mode": "papers",
        "flip": 1,
        "limit": True,
        "weights": {"dino": None},
        "exta": None,
    }
    with pytest.raises(InputError) as caught:
        from_dict(Config, data)
    lines = [line.strip() for line in str(caught.value).splitlines()]
    assert lines[0] == "12 problems in the configuration Config:"
    for start in (
        "exta: unknown key; did you mean 'extra'?",
        "name: missing",
        "head.widht: unknown key; did you mean 'width'?",
        "head.scale: got 1 items; valid: 2.",
        "lr.kind: got 'Cosin'; valid: Cosine, Constant.",
        "stages[0].base: got '1'; Valid: float.",
        "stages[1]: steps is -1",
        "stages[2]: got 3",
        "mode: got 'papers'; did you mean 'paper'? Valid: 'released', 'paper'.",
        "flip: got 1; Valid: bool.",
        "limit: got True; Valid: int or 'auto' or null.",
        "weights.dino: got None; Valid: float.",
    ):
        assert [line for line in lines if line.startswith(start)], (start, lines)


@pytest.mark.parametrize("data", [[], "x", None, 3])
def test_what_is_no_mapping_is_refused(data):
    with pytest.raises(InputError, match="a mapping of the fields of Config"):
        from_dict(Config, data)
