"""Fixtures of extraction: a tiny model whose blocks do something, and pictures of mixed sizes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import densedino as dd
from densedino.features.planning import Settings

SIZES = [(32, 48), (64, 64), (50, 70), (64, 64), (32, 48), (97, 33)]  # (H, W)


@pytest.fixture(scope="session")
def tiny():
    """`debug_vit`; random weights begin with blocks that do next to nothing, these do not."""
    dino = dd.load("debug_vit", weights="random")
    for block in dino.model.blocks:
        torch.nn.init.constant_(block.ls1.gamma, 0.5)
    return dino


@pytest.fixture
def write_images():
    """A function that writes numbered pictures into a folder."""

    def write(folder, count, *, start=0):
        folder.mkdir(exist_ok=True)
        for number in range(start, start + count):
            height, width = SIZES[number % len(SIZES)]
            random = np.random.default_rng(number)
            pixels = random.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((width, height)).save(folder / f"{number:04d}.png")

    return write


@pytest.fixture
def images(tmp_path, monkeypatch, write_images):
    """The name of a folder of twelve pictures, seen from the current folder."""
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "images", 12)
    return "images"


@pytest.fixture
def small_segments(monkeypatch):
    """A function that changes the settings of all extractions that follow."""
    choose = Settings.choose

    def change(**changes):
        def chosen(device, *, inputs, batch_size, streaming=False):
            return replace(choose(device, inputs=inputs, batch_size=batch_size, streaming=streaming), **changes)

        monkeypatch.setattr(Settings, "choose", chosen)

    return change
