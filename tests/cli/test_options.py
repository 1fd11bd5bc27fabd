from __future__ import annotations

import pytest

from densedino.cli.options import parse_resize
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
