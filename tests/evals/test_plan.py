"""Plans: resolved, written, read."""

from __future__ import annotations

from pathlib import Path

import pytest

from densedino.errors import InputError, UnknownNameError
from densedino.evals.knn import Settings
from densedino.evals.plan import Plan, plan_from_dict, plan_to_dict, read_plan, resolved


def test_a_plan_goes_to_json_and_back() -> None:
    plan = resolved(Plan(protocol="segmentation", data=Path("d"), models=("vitt16", "raw"), resize=(64, 96)))
    assert plan.view.resize == (64, 96) and plan.settings.neighbours == 30
    assert plan_from_dict(plan_to_dict(plan)) == plan
    assert resolved(Plan(protocol="knn", data=Path("d"))).view.resize == 224, "the protocol's own"


def test_baselines_are_written_out() -> None:
    plan = resolved(Plan(protocol="segmentation", data=Path("d"), baselines=True))
    assert plan.models[:2] == ("vitt16", "vitt16:random") and "unet" in plan.models and not plan.baselines


def test_what_makes_no_sense_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'depth'"):
        resolved(Plan(protocol="dept", data=Path("d")))
    with pytest.raises(InputError, match="settings of Settings for protocol 'segmentation'"):
        resolved(Plan(protocol="segmentation", data=Path("d"), settings=Settings()))
    with pytest.raises(InputError, match="one is named twice"):
        resolved(Plan(protocol="knn", data=Path("d"), models=("raw", "raw")))
    with pytest.raises(InputError, match="at least one"):
        resolved(Plan(protocol="knn", data=Path("d"), seeds=0))
    with pytest.raises(InputError, match="no file"):
        read_plan(tmp_path / "none.py")
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(InputError, match="has no plan"):
        read_plan(tmp_path / "empty.py")
