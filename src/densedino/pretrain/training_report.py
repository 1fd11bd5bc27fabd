"""Owns the report of a run: one self-contained page and one picture, made of what lies in the run's folder.

`write_report(run)`, or `python -m densedino.pretrain.training_report RUN`; the monitor does it while the run goes on.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from densedino.checkpoint import atomic_path
from densedino.errors import DenseDinoError
from densedino.pretrain.report_page import render_page
from densedino.pretrain.report_panels import panels, verdicts
from densedino.pretrain.report_poster import draw_poster
from densedino.pretrain.run_data import read_run

if TYPE_CHECKING:
    import os
    from pathlib import Path

__all__ = ["write_report"]


def write_report(run: str | os.PathLike[str]) -> Path:
    """Write `report.html` and `report.png` into the folder of a run, each whole or not at all; return the page's path.

    Only the folder is read, so it can be done again at any time, also for a run that was killed.

    Raises:
        InputError: the folder holds no run.
    """
    data = read_run(run)
    found, shown = verdicts(data), panels(data)
    with atomic_path(data.folder / "report.png") as path:
        draw_poster(data, found, shown).save(path, format="PNG", compress_level=3)
    page = data.folder / "report.html"
    with atomic_path(page) as path:
        path.write_text(render_page(data, found, shown), encoding="utf-8")
    return page


def _main(args: list[str]) -> int:
    if len(args) != 1 or args[0].startswith("-"):
        print("usage: python -m densedino.pretrain.training_report RUN", file=sys.stderr)
        return 2
    try:
        print(write_report(args[0]))
    except DenseDinoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
