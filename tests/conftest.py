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


def randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Give every parameter a size that matters, so that no branch hides behind LayerScale's 1e-5 or zero biases."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "gamma" in name:
                parameter.copy_(0.2 * noise)
            elif "bias" in name or "token" in name:
                parameter.copy_(0.1 * noise)
            elif parameter.ndim == 1:  # norm weights
                parameter.copy_(1.0 + 0.1 * noise)
            else:
                parameter.copy_(noise * (parameter[0].numel() ** -0.5))
    return model


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
