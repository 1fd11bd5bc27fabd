from __future__ import annotations

import inspect

import pytest

from densedino import errors
from densedino.errors import DenseDinoError, MissingExtraError, UnknownNameError, require


def test_every_error_is_one_of_ours_and_stands_in_the_drawing() -> None:
    for name, item in vars(errors).items():
        if inspect.isclass(item) and issubclass(item, Exception):
            assert issubclass(item, DenseDinoError | Warning)
            assert name in (errors.__doc__ or "")


def test_unknown_names_give_the_nearest_and_the_valid_ones() -> None:
    assert str(UnknownNameError("fruit", "aple", ["pear", "apple"], hint="Eat more.")) == (
        "unknown fruit 'aple'; did you mean 'apple'? Valid: apple, pear. Eat more."
    )
    assert "did you mean" not in str(UnknownNameError("fruit", "zzz", ["apple"]))


def test_a_missing_extra_names_the_command() -> None:
    with pytest.raises(MissingExtraError, match=r"Reading tea leaves needs 'no_such_package'.*densedino\[tea\]"):
        require("no_such_package.sub", extra="tea", purpose="Reading tea leaves")
    assert require("json", extra="x", purpose="y").dumps([]) == "[]"
