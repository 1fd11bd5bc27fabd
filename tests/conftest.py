"""Fixtures that several folders need."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # pytest -n 2 on two cores: more threads only get in each other's way
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from pathlib import Path

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees or changes the user's weights cache."""
    monkeypatch.setenv("DENSEDINO_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of four real photographs (scikit-image's; public domain or CC0) of different sizes, as JPEG and PNG."""
    from PIL import Image
    from skimage import data

    folder = tmp_path_factory.mktemp("photos")
    for name, suffix in (("astronaut", "jpg"), ("chelsea", "png"), ("coffee", "jpg"), ("rocket", "png")):
        image = Image.fromarray(getattr(data, name)())
        image.thumbnail((256, 256))
        image.save(folder / f"{name}.{suffix}")
    return folder
