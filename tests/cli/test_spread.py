"""The options of shared work."""

from __future__ import annotations

import pytest

from densedino.cli.main import main
from densedino.cli.spread import SpreadFlags
from densedino.errors import InputError
from densedino.features.spread import RayRunner


def test_what_the_options_mean():
    assert SpreadFlags().ray() is None
    assert SpreadFlags(runner="ray", ray_address="auto", workers=3).ray() == RayRunner(address="auto", workers=3)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (SpreadFlags(workers=2), "--runner ray"),
        (SpreadFlags(ray_address="auto"), "--runner ray"),
        (SpreadFlags(runner="ray", workers=0), "at least 1"),
    ],
)
def test_options_that_do_not_go_together(flags, message):
    with pytest.raises(InputError, match=message):
        flags.ray()


def test_they_are_options_of_extract(photos, capsys):
    assert main(["extract", str(photos), "--workers", "2"]) == 2
    assert "--runner ray" in capsys.readouterr().err
