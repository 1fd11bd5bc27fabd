"""What is read from a run's folder, whole or not."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from densedino.errors import InputError
from densedino.pretrain.run_data import FRAMES, flat_numbers, read_run

if TYPE_CHECKING:
    from pathlib import Path


def test_a_run_is_read_with_its_doubled_and_cut_lines(run_folder: Path) -> None:
    run = read_run(run_folder)
    assert [line["step"] for line in run.metrics] == list(range(10, 1201, 10))
    assert run.step == 1200
    assert run.stages == [("pretrain", 0, 1000), ("gram", 1000, 1500)]
    assert run.stage == "gram"
    assert run.total("images") == 9600
    assert run.total("nothing") == 0
    assert [series.label for series in run.logged("losses")] == ["total", "dino"]
    assert len(run.logged("losses")[0].values) == 119, "the step without a number has none"
    assert run.logged("images_per_second")[0].label == "images per second"
    assert [series.label for series in run.measured({"knn": "k", "nothing": "n"})] == ["k"]
    assert len(run.quarantine) == 1


def test_drift_is_measured_from_the_best_look(run_folder: Path) -> None:
    drifts = read_run(run_folder).drifts
    assert drifts is not None
    assert drifts.reference == 600
    by_step = dict(zip(drifts.steps, drifts.from_reference, strict=True))
    assert by_step[600] == 0
    assert by_step[1200] > by_step[900] > by_step[500]
    assert 300 not in by_step


def test_the_film_has_the_first_and_the_last_look(run_folder: Path) -> None:
    film = read_run(run_folder).film
    assert film is not None
    assert len(film.steps) == FRAMES
    assert (film.steps[0], film.steps[-1]) == (0, 1200)
    assert len(film.frames) == len(film.photos) == 3


def test_a_run_that_has_just_begun_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    run = read_run(tmp_path)
    assert (run.step, run.drifts, run.film, run.stages) == (0, None, None, [("run", 0, 1)])


def test_looks_at_other_images_are_not_compared(run_folder: Path) -> None:
    look = run_folder / "looks" / "step-00000100.json"
    look.write_text(look.read_text().replace("photos/1.jpg", "photos/other.jpg"))
    drifts = read_run(run_folder).drifts
    assert drifts is not None
    assert 100 not in drifts.steps


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no run"):
        read_run(tmp_path)


def test_numbers_of_nested_mappings_get_flat_names() -> None:
    data = {"step": 3, "losses": {"dino": 1.5, "name": "x"}, "finite": True, "none": None, "list": [1]}
    assert dict(flat_numbers(data)) == {"step": 3.0, "losses/dino": 1.5, "finite": 1.0}
