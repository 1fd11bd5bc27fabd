"""The report's picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from densedino.pretrain.report_panels import panels, verdicts
from densedino.pretrain.report_poster import draw_poster
from densedino.pretrain.run_data import read_run

if TYPE_CHECKING:
    from pathlib import Path


def test_the_poster_has_charts_and_film(run_folder: Path) -> None:
    run = read_run(run_folder)
    with_film = draw_poster(run, verdicts(run), panels(run))
    assert with_film.mode == "RGB"
    pixels = np.asarray(with_film)
    assert 0.01 < (pixels != 255).any(-1).mean() < 0.6
    assert (pixels[-1] == 255).all(), "nothing is cut off at the bottom"
    assert (pixels[:, -1] == 255).all(), "nor at the right"


def test_a_run_that_has_just_begun_has_a_poster(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    run = read_run(tmp_path)
    assert draw_poster(run, verdicts(run), panels(run)).height > 100
