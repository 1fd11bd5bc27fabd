"""Every cell of the published table has a plan."""

from __future__ import annotations

from pathlib import Path

import pytest

from densedino.errors import UnknownNameError
from densedino.evals.plan import plan_from_dict, plan_to_dict, resolved
from densedino.evals.published import PUBLISHED
from densedino.recipes.published import COLUMNS, published_cell


@pytest.mark.parametrize("column", COLUMNS)
def test_a_cell_is_a_sound_plan(column: str) -> None:
    plan = resolved(published_cell(column, "vits16", data=Path("d"), output=Path("o"), weights=Path("w.pth")))
    assert plan.models == ("vits16:w.pth",) and plan.view.resize == COLUMNS[column][1].resize
    assert plan_from_dict(plan_to_dict(plan)) == plan
    assert plan.protocol in {protocol for protocol, _, _ in PUBLISHED}


def test_a_misspelt_column_is_named() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'davis'"):
        published_cell("davi", "vits16", data=Path("d"), output=Path("o"))
