from __future__ import annotations

from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings

import densedino as dd
from densedino.engines.eager import EagerEngine
from densedino.engines.merged import MergedEngine, group_patches
from densedino.errors import InputError
from densedino.models.catalog import create_model, model_spec

CPU = torch.device("cpu")


@settings(max_examples=40, deadline=None)
@given(h=st.integers(1, 7), w=st.integers(1, 7), share=st.floats(0.01, 0.75), seed=st.integers(0, 99))
def test_groups_hold_every_patch_once_and_only_neighbours(h, w, share, seed):
    patches = torch.randn(2, h * w, 3, generator=torch.Generator().manual_seed(seed))
    groups = group_patches(patches, (h, w), share=share)
    movable = h * w - ((h + 1) // 2) * ((w + 1) // 2)
    assert groups.sizes.shape == (2, h * w - min(int(share * h * w), movable))
    assert (groups.sizes.sum(1) == h * w).all() and (groups.sizes >= 1).all()
    for ids, sizes in zip(groups.ids, groups.sizes, strict=True):
        assert torch.equal(torch.bincount(ids, minlength=len(sizes)).float(), sizes)
        for group in range(len(sizes)):
            members = (ids == group).nonzero()[:, 0]
            rows, columns = members // w, members % w
            assert rows.max() - rows.min() <= 3 and columns.max() - columns.min() <= 3


def test_those_most_alike_go_and_means_are_means():
    patches = torch.randn(1, 16, 8, generator=torch.Generator().manual_seed(0))
    patches[0, 1] = patches[0, 0] * 2
    patches[0, 7] = patches[0, 2]
    groups = group_patches(patches, (4, 4), share=0.125)
    ids = groups.ids[0].tolist()
    assert ids[0] == ids[1] and ids[2] == ids[7] and len(set(ids)) == 14
    means = groups.mean(patches)
    torch.testing.assert_close(means[0, ids[0]], patches[0, 0] * 1.5)
    torch.testing.assert_close(groups.spread(means)[0, [3, 7]], patches[0, [3, 7]])


def lively(name):
    torch.manual_seed(0)
    model = create_model(replace(model_spec(name), depth=4))
    with torch.no_grad():
        for key, value in model.named_parameters():
            if key.endswith("gamma"):
                value.fill_(0.3)
            elif value.ndim > 1:
                value.normal_(std=0.2)
    return model


@pytest.mark.parametrize("name", ["debug_vit", "debug_vit_swiglu"])
def test_where_nothing_can_merge_it_is_the_plain_model(name):
    model, x = lively(name), torch.randn(2, 3, 16, 16)  # one patch
    wanted = EagerEngine(model, device=CPU, precision="fp32")(x, layers=(-1, 0, 2), norm=False)
    got = MergedEngine(model, device=CPU, precision="fp32", merge=0.5)(x, layers=(-1, 0, 2), norm=False)
    for one, other in zip(got, wanted, strict=True):
        for field in ("patches", "cls", "registers"):
            torch.testing.assert_close(getattr(one, field), getattr(other, field), rtol=1e-4, atol=1e-5)


def test_equal_patches_merge_for_nothing():
    model = lively("debug_vit")
    block = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    x = F.interpolate(block[:, :, ::16, ::16], size=(96, 64), mode="nearest")  # 2×2 areas of equal pixels
    plain, merged = (
        engine(x)[0]
        for engine in (
            EagerEngine(model, device=CPU, precision="fp32"),
            MergedEngine(model, device=CPU, precision="fp32", merge=0.4),
        )
    )
    assert merged.patches.shape == plain.patches.shape == (1, 6, 4, 32)
    assert F.cosine_similarity(merged.patches, plain.patches, dim=-1).mean() > 0.99


def test_less_merging_is_nearer_and_bf16_runs():
    model, x = lively("debug_vit"), torch.randn(2, 3, 96, 80, generator=torch.Generator().manual_seed(2))
    exact = EagerEngine(model, device=CPU, precision="fp32")(x)[0].patches
    near = [
        F.cosine_similarity(MergedEngine(model, device=CPU, precision="fp32", merge=m)(x)[0].patches, exact, dim=-1)
        for m in (0.1, 0.6)
    ]
    assert near[0].mean() > near[1].mean()
    half = MergedEngine(model, device=CPU, precision="bf16", merge=0.1)(x)[0].patches
    assert half.dtype == torch.float32
    assert F.cosine_similarity(half, exact, dim=-1).mean() > near[0].mean() - 0.01


def test_it_is_off_by_default_and_known_by_its_fingerprint():
    plain = dd.load("debug_vit", weights="random")
    merged = dd.load("debug_vit", weights="random", merge=0.25)
    assert plain.engine.name == merged.engine.name == "eager"
    assert plain.numerics == "fp32" and merged.numerics == "fp32, 0.25 merged"
    assert plain.fingerprint != merged.fingerprint
    assert merged(torch.rand(3, 64, 48)).patches.shape == (1, 4, 3, 32)


@pytest.mark.parametrize(
    "options",
    [{"merge": 0.8}, {"merge": -0.1}, {"merge": 0.2, "engine": "onnx"}, {"merge": 0.2, "device_map": "auto"}],
)
def test_what_cannot_be_is_refused(options):
    with pytest.raises(InputError, match="merge="):
        dd.load("debug_vit", weights="random", **options)
    with pytest.raises(InputError, match="debug_convnext is none"):
        dd.load("debug_convnext", weights="random", merge=0.2)
