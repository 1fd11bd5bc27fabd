from __future__ import annotations

import pytest

from densedino.models.catalog import MODELS, ViTSpec, create_model
from densedino.models.counts import block_parameters, multiplications, parameter_count


@pytest.mark.parametrize("name", MODELS)
def test_counts_are_those_of_the_model(name):
    model = create_model(name, in_chans=7, device="meta")
    assert parameter_count(MODELS[name], in_chans=7) == sum(p.numel() for p in model.parameters())
    if isinstance(MODELS[name], ViTSpec):
        assert block_parameters(MODELS[name]) == sum(p.numel() for p in model.blocks[0].parameters())


def test_multiplications_grow_with_the_image():
    assert multiplications(MODELS["vits16"], side=224) == multiplications(MODELS["vits16"], side=(224, 230))
    for name in ("vits16", "convnext_tiny"):
        one, four = (multiplications(MODELS[name], side=side) for side in ((224, 224), (448, 448)))
        assert 3.9 < four / one < 6
