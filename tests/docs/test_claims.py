"""Figures that the docs state and that no other test holds."""

from __future__ import annotations

import pytest
import torch

from densedino.models import rope
from densedino.models.catalog import create_model


@pytest.mark.parametrize("name", ["vits16", "vitb16"])
def test_rounded_rope_periods_hardly_matter(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/weights.md: bfloat16 periods move values by some 2e-3 at most; tokens keep a cosine of 0.99999."""
    torch.manual_seed(0)
    model = create_model(name)
    for key, parameter in model.named_parameters():
        if key.endswith("gamma"):
            parameter.data.fill_(1.0)  # as large as trained ones, so that attention matters
        elif key.endswith("weight") and parameter.ndim == 2:
            parameter.data.normal_(std=parameter.shape[1] ** -0.5)
    x = torch.randn(1, 3, 224, 320)
    exact_periods = rope.rope_periods
    with torch.no_grad():
        exact = model.forward_features(x)["x_norm_patchtokens"]
        monkeypatch.setattr(rope, "rope_periods", lambda *a, **k: exact_periods(*a, **k).bfloat16().float())
        model.rope_embed._cache.clear()
        rounded = model.forward_features(x)["x_norm_patchtokens"]
    assert 1e-6 < (exact - rounded).abs().max() <= 3e-3
    assert torch.cosine_similarity(exact, rounded, dim=-1).min() >= 0.99999
