from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from densedino.models.catalog import create_model, model_spec
from densedino.pretrain.pruning import Cut, choose_cut, measure_branches
from densedino.pretrain.refit import cut_model, refit, ridge


@pytest.fixture(params=["debug_vit", "debug_vit_swiglu"])
def model(request):
    torch.manual_seed(0)
    spec = replace(model_spec(request.param), name="v", embed_dim=32, depth=3, num_heads=4, hidden_dim=96)
    made = create_model(spec)
    with torch.no_grad():
        for key, value in made.named_parameters():
            if key.endswith("gamma"):
                value.uniform_(0.2, 0.4)
            elif value.ndim > 1:
                value.normal_(std=0.2)
    return made


def pictures(seed):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 3, 64, 64, generator=g) for _ in range(16)]


def cosine(one, other, images):
    with torch.no_grad():
        a, b = (torch.cat([m.get_intermediate_layers(x)[0] for x in images]) for m in (one, other))
    return float(F.cosine_similarity(a, b, dim=-1).mean())


def test_keeping_everything_changes_nothing(model):
    spec = model.spec
    columns = {(i, part): torch.arange(n) for i in range(3) for part, n in (("attn", 32), ("mlp", 96))}
    cut = Cut(replace(spec, pruned=((4, 96),) * 3), (0, 1, 2), columns)
    small = cut_model(model, cut)
    assert cosine(small, model, pictures(0)) == pytest.approx(1, abs=1e-6)
    refit(small, model, cut, pictures(0))
    assert cosine(small, model, pictures(5)) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("dropped", [0, 1])
def test_a_refit_brings_a_cut_model_nearer_on_other_images(model, dropped):
    branches = measure_branches(model, pictures(0))
    cut = choose_cut(model.spec, branches, keep=0.65, side=64, dropped=dropped)
    small = cut_model(model, cut)
    before = cosine(small, model, pictures(5))
    refit(small, model, cut, pictures(0))
    assert cosine(small, model, pictures(5)) > before
    assert all(torch.isfinite(p).all() for p in small.parameters())


def test_ridge_finds_an_affine_map():
    g = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(3, 50, 6, generator=g) + 5,
        torch.randn(4, 6, generator=g),
        torch.randn(4, generator=g),
    )
    found = ridge(list(x), [part @ weight.T + bias for part in x], penalty=1e-9)
    torch.testing.assert_close(found, (weight, bias), rtol=1e-3, atol=1e-3)
