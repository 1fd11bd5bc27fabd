from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from densedino.features.pictures import Picture
from densedino.features.sheet import Row, draw_sheet, save_png

if TYPE_CHECKING:
    from pathlib import Path


def test_the_sheet_holds_every_panel_and_frames_the_patch(tmp_path: Path) -> None:
    pictures = [
        Picture(image=Image.new("RGB", (224, 160), colour), title="a panel", scale=(0.0, 1.0), box=box)
        for colour, box in (((0, 0, 200), None), ((200, 200, 0), (0.1, 0.1, 0.2, 0.2)))
    ]
    photo = Image.new("RGB", (224, 160), (0, 128, 0))
    row = Row(photo=photo, caption=("a very long name of a photograph " * 5, "224x160"), pictures=pictures)
    sheet = draw_sheet([row, row], heading="heading", alarm="UNTRAINED")
    assert sheet.width > 3 * 224 and sheet.height > 2 * 160
    pixels_ = np.asarray(sheet)
    assert (pixels_ == (0, 128, 0)).all(-1).sum() > 2 * 224 * 160 * 0.8
    assert (pixels_ == (196, 30, 30)).all(-1).any(), "the alarm is red"
    assert (pixels_ == (0, 0, 200)).all(-1).sum() > 2 * 224 * 160 * 0.8
    calm = draw_sheet([row, row], heading="heading")
    assert not (np.asarray(calm) == (196, 30, 30)).all(-1).any()
    save_png(sheet, tmp_path / "sheet.png", facts={"Untrained": "yes", "Comment": "größer"})
    with Image.open(tmp_path / "sheet.png") as read:
        assert read.info["Untrained"] == "yes" and read.info["Comment"] == "größer"
        assert read.size == sheet.size
