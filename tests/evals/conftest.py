"""Small data sets that tests make, and a narrator that says nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

COLOURS = np.array([[200, 40, 40], [40, 180, 60], [50, 60, 210]])


class Silent:
    """Nobody is told."""

    def say(self, text: str) -> None:
        pass

    def begin(self, what: str, total: int) -> Callable[[int], None]:
        return lambda count: None


@pytest.fixture
def silent() -> Silent:
    return Silent()


def scene(rng: np.random.Generator, size: tuple[int, int] = (64, 96)) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """A picture of coloured blocks and its labels: left and right halves and a box, classes by colour."""
    labels = np.zeros(size, np.uint8)
    labels[:, size[1] // 2 :] = 1
    top, left = rng.integers(0, size[0] - 32), rng.integers(0, size[1] - 32)
    labels[top : top + 32, left : left + 32] = 2
    noise = rng.normal(0, 12, (*size, 3))
    return (COLOURS[labels] + noise).clip(0, 255).astype(np.uint8), labels


@pytest.fixture(scope="session")
def mask_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 + 4 scenes in CamVid's layout with three named classes; a strip of every mask is void."""
    root, rng = tmp_path_factory.mktemp("masks"), np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4)):
        for part in (split, f"{split}annot"):
            (root / part).mkdir()
        for i in range(count):
            image, labels = scene(rng)
            labels[:5] = 255
            Image.fromarray(image).save(root / split / f"{i}.png")
            Image.fromarray(labels).save(root / f"{split}annot" / f"{i}.png")
    (root / "classes.txt").write_text("left\nright\nbox\n")
    return root


@pytest.fixture(scope="session")
def class_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes told by colour, 6 + 4 images of each."""
    root, rng = tmp_path_factory.mktemp("classes"), np.random.default_rng(1)
    for split, count in (("train", 6), ("val", 4)):
        for number, colour in enumerate(COLOURS):
            folder = root / split / f"class{number}"
            folder.mkdir(parents=True)
            for i in range(count):
                image = (colour + rng.normal(0, 25, (48, 48, 3))).clip(0, 255).astype(np.uint8)
                Image.fromarray(image).save(folder / f"{i}.png")
    return root


@pytest.fixture(scope="session")
def video_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sequences of five frames in which a coloured box moves."""
    root, rng = tmp_path_factory.mktemp("video"), np.random.default_rng(2)
    for name, step in (("slow", 4), ("fast", 12)):
        for part in ("frames", "masks"):
            (root / part / name).mkdir(parents=True)
        for t in range(5):
            mask = np.zeros((96, 128), bool)
            mask[24:72, 8 + step * t : 56 + step * t] = True
            image = np.where(mask[..., None], COLOURS[0], COLOURS[2]) + rng.normal(0, 8, (96, 128, 3))
            Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(root / "frames" / name / f"{t:05d}.jpg")
            Image.fromarray(mask.astype(np.uint8) * 255).save(root / "masks" / name / f"{t:05d}.png")
    return root
