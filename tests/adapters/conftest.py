"""Folders of labelled images, small and made here: red squares on green, a depth that goes with the row."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

if TYPE_CHECKING:
    from pathlib import Path

SIZE = (64, 80)


def scene(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixels and mask of a red square on green; 255 in the first rows."""
    rng = np.random.default_rng(number)
    mask = np.zeros(SIZE, np.uint8)
    top, left = rng.integers(8, SIZE[0] - 24), rng.integers(8, SIZE[1] - 24)
    mask[top : top + 24, left : left + 24] = 1
    mask[:4] = 255
    pixels = np.where(mask[..., None] == 1, [220, 40, 40], [30, 130, 60]) + rng.normal(0, 15, (*SIZE, 3))
    return pixels.clip(0, 255).astype(np.uint8), mask


@pytest.fixture
def masks(tmp_path: Path) -> Path:
    """Eight images with masks; two of them validate."""
    folder = tmp_path / "data"
    for sub in ("images", "masks"):
        (folder / sub).mkdir(parents=True)
    for i in range(8):
        pixels, mask = scene(i)
        Image.fromarray(pixels).save(folder / "images" / f"{i}.png")
        Image.fromarray(mask).save(folder / "masks" / f"{i}.png")
    return folder


@pytest.fixture
def depths(tmp_path: Path) -> Path:
    """Eight images that are the brighter the nearer, with depth in millimetres and a corner unknown."""
    folder = tmp_path / "depths"
    for sub in ("images", "depth"):
        (folder / sub).mkdir(parents=True)
    for i in range(8):
        depth = np.tile(np.linspace(1000, 4000 + 100 * i, SIZE[0])[:, None], (1, SIZE[1]))
        grey = (255 - depth / 40).clip(0, 255).astype(np.uint8)
        depth[:5, :5] = 0
        Image.fromarray(np.stack([grey] * 3, -1)).save(folder / "images" / f"{i}.png")
        Image.fromarray(depth.astype(np.uint16)).save(folder / "depth" / f"{i}.png")
    return folder


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """Red and green images in folders of their own."""
    folder = tmp_path / "classes"
    for name, colour in (("green", (30, 130, 60)), ("red", (220, 40, 40))):
        (folder / name).mkdir(parents=True)
        for i in range(4):
            noise = np.random.default_rng(i).normal(0, 20, (48, 48, 3))
            Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8)).save(folder / name / f"{i}.png")
    return folder
