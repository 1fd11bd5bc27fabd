from __future__ import annotations

import pytest
import torch

from densedino.models.catalog import create_model, list_models
from densedino.models.draws import Draws, Kept


@pytest.mark.parametrize("name", list_models("debug_*"))
def test_a_sample_whose_branches_all_drop_is_only_embedded(name: str) -> None:
    model = create_model(name).train()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    branches = sum(model.spec.depths) if "convnext" in name else 2 * model.depth
    x = torch.randn(3, 3, 64, 64)
    kept = tuple(Kept(torch.tensor([0, 2]), 1.0) for _ in range(branches))
    everybody = model.training_features(x)[0]
    some = model.training_features(x, draws=Draws(kept=kept))[0]
    torch.testing.assert_close(some[[0, 2]], everybody[[0, 2]])
    assert not torch.allclose(some[1], everybody[1])
