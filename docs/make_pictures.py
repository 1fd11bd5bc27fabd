"""Make the pictures of the README and the docs: docs/images/*.png, by the commands that the README shows.

    python docs/make_pictures.py [--weights FILE]

Without weights the package's own are drawn. The photographs are scikit-image's: astronaut (NASA, public domain), cat
(S. van der Walt, CC0), coffee (R. Michniewicz, CC0), rocket (SpaceX, CC0).
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import tempfile
from pathlib import Path

from PIL import Image
from skimage import data

from densedino.cli.main import main

IMAGES = Path(__file__).resolve().parent / "images"
SHEETS = {
    "pca.png": ["astronaut.png", "cat.png", "--what", "pca", "foreground"],
    "joint.png": ["cat.png", "coffee.png", "rocket.png", "--what", "pca", "--joint"],
    "similarity.png": ["cat.png", "--point", "130,80", "--what", "similarity", "attention"],
}


def make(extra: list[str]) -> None:
    """Draw every sheet, with `extra` arguments for each."""
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        photos = {
            "astronaut": data.astronaut(),
            "cat": data.chelsea(),
            "coffee": data.coffee(),
            "rocket": data.rocket(),
        }
        for name, photo in photos.items():
            Image.fromarray(photo).save(Path(folder) / f"{name}.png")
        for out, args in SHEETS.items():
            args = [str(Path(folder) / arg) if arg.endswith(".png") else arg for arg in args]
            if status := main(["view", *args, "-o", str(IMAGES / out), "--panel", "320", *extra]):
                sys.exit(status)
        of_features(Path(folder), extra)


def of_features(folder: Path, extra: list[str]) -> None:
    """Draw what was found with an eye of the cat, and what eight clicks on the astronaut say."""
    clicks = ["--foreground", "230,80", "220,300", "330,320", "90,400"]
    clicks += ["--background", "450,60", "30,60", "20,200", "480,470"]
    with contextlib.chdir(folder):  # sheets name files as they were given
        for command in (
            ["extract", "astronaut.png", "cat.png", "coffee.png", "-o", "features", *extra],
            ["search", "features", "--query", "cat.png", "--point", "170,130", "-o", str(IMAGES / "search.png")],
            ["segment", "astronaut.png", *clicks, "-o", "mask.png", *extra],
        ):
            if status := main(command):
                sys.exit(status)
        shutil.copy("mask_sheet.png", IMAGES / "segment.png")


if __name__ == "__main__":
    make(sys.argv[1:])
