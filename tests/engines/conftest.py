"""Fixtures of engines: backbones whose blocks do something, and one image batch of no special size."""

from __future__ import annotations

import pytest
import torch

from densedino.models.catalog import create_model


@pytest.fixture(scope="session")
def lively():
    """A function that makes a model by name with random weights of such a size that every part of it shows."""

    def make(name, *, in_chans=3, seed=0):
        generator = torch.Generator().manual_seed(seed)
        model = create_model(name, in_chans=in_chans)
        with torch.no_grad():
            for key, value in model.named_parameters():
                noise = torch.randn(value.shape, generator=generator)
                if key.endswith("gamma"):
                    value.copy_(0.3 + 0.05 * noise)
                elif key.endswith("weight") and value.ndim == 1:
                    value.copy_(1.0 + 0.1 * noise)
                else:
                    value.copy_(noise * (0.1 if value.ndim == 1 or "token" in key else value[0].numel() ** -0.5))
        return model

    return make


@pytest.fixture(scope="session")
def compiled_cache(tmp_path_factory):
    """A cache that tests share, so that one graph is made once; tests that look into the cache have their own."""
    return tmp_path_factory.mktemp("engines")
