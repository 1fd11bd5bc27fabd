"""Fixtures of scenes: a tiny model whose blocks do something, and rasters made on the spot."""

from __future__ import annotations

import numpy as np
import pytest
import rasterio
import torch

import densedino as dd


@pytest.fixture(scope="session")
def tiny():
    """`debug_vit`; random weights begin with blocks that do next to nothing, these do not."""
    dino = dd.load("debug_vit", weights="random")
    for block in dino.model.blocks:
        torch.nn.init.constant_(block.ls1.gamma, 0.5)
        torch.nn.init.constant_(block.ls2.gamma, 0.5)
    return dino


@pytest.fixture(scope="session")
def picture():
    """A function: [C, H, W] of blobs that differ everywhere, uint8."""

    def make(height, width, *, count=3, seed=0):
        random = np.random.default_rng(seed)
        coarse = random.integers(0, 256, (count, height // 8 + 2, width // 8 + 2), dtype=np.uint8)
        return coarse.repeat(8, 1).repeat(8, 2)[:, :height, :width]

    return make


@pytest.fixture
def write_raster(tmp_path):
    """A function that writes [C, H, W] as a GeoTIFF with UTM coordinates, and returns its path as text."""

    def write(array, name="scene.tif", *, crs="EPSG:32632", transform=None, **options):
        transform = transform or rasterio.Affine(10, 0, 500_000, 0, -10, 5_000_000)
        path = tmp_path / name
        settings = {"driver": "GTiff", "count": len(array), "height": array.shape[1], "width": array.shape[2]}
        settings |= {"dtype": array.dtype, "crs": crs, "transform": transform} | options
        with rasterio.open(path, "w", **settings) as file:
            file.write(array)
        return str(path)

    return write
