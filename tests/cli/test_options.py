from dataclasses import dataclass
from typing import Literal

import pytest

from densedino.cli.options import override, parse_resize
from densedino.errors import InputError


@pytest.mark.parametrize(
    ("text", "meant"), [("native", None), ("512", 512), ("512x768", (512, 768)), ("64X32", (64, 32)), ("8×9", (8, 9))]
)
def test_resize(text: str, meant: object) -> None:
    assert parse_resize(text) == meant


@pytest.mark.parametrize("text", ["", "0", "12x0", "-5", "512,768", "1x2x3", "٥", "12px", "auto"])
def test_resize_that_cannot_be_meant(text: str) -> None:
    with pytest.raises(InputError, match="--resize"):
        parse_resize(text)


@dataclass(frozen=True, kw_only=True)
class Inner:
    base: float = 1.0
    kind_of: Literal["a", "b"] = "a"


@dataclass(frozen=True, kw_only=True)
class Stage:
    name: str
    steps: int = 10
    lr: Inner = Inner()
    note: str | None = None


@dataclass(frozen=True, kw_only=True)
class Run:
    stages: tuple[Stage, ...]
    seed: int = 0
    inner: Inner | None = None


RUN = Run(stages=(Stage(name="first"), Stage(name="second")))


def test_override_sets_any_field_and_leaves_the_rest() -> None:
    changed = override(
        RUN,
        ("seed=3", "second.steps=20", "stages.0.lr.base=0.5", "stages.first.lr.kind_of=b", "second.note=None",
         "first.note=a b", 'inner={"base": 2}'),
    )  # fmt: skip
    first = Stage(name="first", lr=Inner(base=0.5, kind_of="b"), note="a b")
    assert changed == Run(stages=(first, Stage(name="second", steps=20)), seed=3, inner=Inner(base=2.0))
    assert override(RUN, ()) is RUN


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("sead=3", "unknown field 'sead'; did you mean 'seed'?"),
        ("secund.steps=3", "unknown field 'secund'; did you mean 'second'? Valid: first, inner, second, seed, stages."),
        ("first.stesp=3", "unknown field 'stesp'; did you mean 'steps'?"),
        (
            "first.lr.bace=3",
            "unknown field 'bace'; did you mean 'base'? Valid: base, kind_of. (in --set first.lr.bace)",
        ),
        ("stages.5.steps=3", "unknown field '5'. Valid: 0, 1, first, second."),
        ("seed.more=3", "there is nothing 'more' in 0"),
        ("inner.base=3", "there is nothing 'base' in null"),
        ("seed=three", "seed: got 'three'; Valid: int."),
        ("first.lr=3", "first.lr has fields of its own: base, kind_of"),
        ("first.lr.kind_of=c", "stages[0].lr.kind_of: got 'c'"),
        ("seed", "give FIELD=VALUE"),
        ("=3", "give FIELD=VALUE"),
    ],
)
def test_override_refuses_what_is_no_field_or_no_value_of_it(assignment: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        override(RUN, (assignment,))
    assert message in str(error.value)
