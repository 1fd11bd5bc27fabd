from __future__ import annotations

import re

import pytest

from densedino.errors import UnknownNameError
from densedino.models.catalog import MODELS
from densedino.weights.catalog import IMAGENET_STATS, SAT493M_STATS, WEIGHTS, list_weights, weights_record


@pytest.mark.parametrize("record", WEIGHTS.values(), ids=list(WEIGHTS))
def test_every_row_is_complete(record):
    assert record.model in MODELS
    assert record.name.startswith(f"{record.model}-")
    assert re.fullmatch(r"[0-9a-f]{8}", record.sha256)
    assert record.file.endswith(f"-{record.sha256}.pth")
    assert record.licence == "DINOv3 License" and record.licence_url.startswith("https://")
    assert (record.mean, record.std) == (SAT493M_STATS if record.data == "SAT-493M" else IMAGENET_STATS)


def test_rows_are_those_that_were_released():
    assert len(WEIGHTS) == 13  # 12 announced, and vitl16plus, which is wired in the release
    assert len({record.sha256 for record in WEIGHTS.values()}) == 13
    assert list_weights("*sat493m") == ["vitl16-sat493m", "vit7b16-sat493m"]


def test_unknown_name_says_the_nearest():
    with pytest.raises(UnknownNameError, match="did you mean 'vitl16-sat493m'"):
        weights_record("vitl16-sat439m")
