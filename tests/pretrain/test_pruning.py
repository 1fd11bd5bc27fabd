from __future__ import annotations

from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from densedino.errors import InputError
from densedino.models.catalog import create_model, model_spec
from densedino.models.counts import multiplications
from densedino.pretrain.pruning import Branch, choose_cut, last_map, measure_branches, removal_order

SPEC = replace(model_spec("debug_vit"), name="v", embed_dim=32, depth=3, num_heads=4, hidden_dim=96)


def lively(spec):
    torch.manual_seed(0)
    model = create_model(spec)
    with torch.no_grad():
        for key, value in model.named_parameters():
            if key.endswith("gamma"):
                value.fill_(0.3)
            elif value.ndim > 1:
                value.normal_(std=0.2)
    return model


def pictures(count=3):
    torch.manual_seed(1)
    return [torch.randn(2, 3, 64, 48) for _ in range(count)]


def refit_error(weight, covariance, metric, kept):
    """By definition: the best other weights for the kept columns, and what they leave of the squared error."""
    best = weight @ covariance[:, kept] @ torch.linalg.inv(covariance[kept][:, kept])
    gap = weight.clone()
    gap[:, kept] -= best
    return torch.trace(metric @ gap @ covariance @ gap.T)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), size=st.sampled_from([1, 2, 4]), whole=st.booleans())
def test_errors_are_those_of_the_best_refit(seed, size, whole):
    g = torch.Generator().manual_seed(seed)
    weight, x, m = (torch.randn(*shape, generator=g).double() for shape in ((5, 8), (40, 8), (5, 5)))
    covariance, metric = x.T @ x / 40, m @ m.T
    order, errors = removal_order(weight, covariance, metric, size=size, whole=whole)
    assert sorted(order.tolist()) == list(range(8))
    assert errors[0] == 0 and len(errors) == 1 + 8 // size
    for groups in range(1, 8 // size):
        kept = order[groups * size :]
        assert errors[groups] == pytest.approx(float(refit_error(weight, covariance, metric, kept)), rel=1e-2)
    if whole:
        assert all(sorted(o.tolist()) == list(range(int(o.min()), int(o.min()) + size)) for o in order.split(size))


def test_what_a_neighbour_can_stand_for_goes_first():
    x = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    x[:, 3] = x[:, 1] * 2 + 0.01 * x[:, 3]  # large, but told by column 1
    weight = torch.tensor([[1.0, 1.0, 0.3, 5.0]])
    order, errors = removal_order(weight, x.T @ x / 200, torch.eye(1), size=1, whole=False)
    assert int(order[0]) in (1, 3)
    assert errors[1] < 0.01 < errors[2]


def test_a_first_group_takes_what_is_left_over():
    order, errors = removal_order(torch.randn(2, 70), torch.eye(70), torch.eye(2), size=32, whole=False)
    assert len(order) == 70 and len(errors) == 4  # 6, 32, 32


def test_measured_importance_is_what_removal_does_to_the_output():
    model = lively(SPEC)
    with torch.no_grad():  # two heads of a block that hardly write
        model.blocks[1].attn.proj.weight[:, 8:16] *= 0.01
        model.blocks[1].attn.proj.weight[:, 24:] *= 0.01
    images = pictures()
    branches = measure_branches(model, images)
    assert [(b.block, b.part) for b in branches] == [(i, part) for i in range(3) for part in ("attn", "mlp")]
    heads = branches[2]
    assert {int(c) // 8 for c in heads.order[:16]} == {1, 3}
    assert heads.errors[2] < 0.05 * heads.errors[3]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any(image.requires_grad for image in images)


def test_a_model_whose_head_is_swiglu_is_measured_too():
    model = lively(replace(model_spec("debug_vit_swiglu"), depth=2))
    assert last_map(model.blocks[0], "mlp") is model.blocks[0].mlp.w3
    assert len(measure_branches(model, pictures(1))) == 4


def branches_of(spec):
    found = []
    for i in range(spec.depth):
        found.append(Branch(i, "attn", torch.arange(32), tuple(float(k * (i + 1)) for k in range(5))))
        found.append(Branch(i, "mlp", torch.arange(96), tuple(0.01 * k * (i + 1) for k in range(4))))
    return found


@settings(max_examples=30, deadline=None)
@given(keep=st.floats(0.35, 0.99), dropped=st.integers(0, 1))
def test_a_cut_keeps_what_was_asked_and_no_less_than_it_must(keep, dropped):
    try:
        cut = choose_cut(SPEC, branches_of(SPEC), keep=keep, side=64, dropped=dropped)
    except InputError as error:
        assert "Keep more" in str(error) and keep < 0.6
        return
    whole = multiplications(SPEC, side=64)
    left = multiplications(cut.spec, side=64) / whole
    assert left <= keep
    if not dropped:  # one group more would be too many
        assert left > keep - 32 * 32 * 2 * 21 / whole - 8 * (4 * 32 + 2 * 21) * 21 / whole
    assert len(cut.blocks) == cut.spec.depth == 3 - dropped
    assert 0 in cut.blocks or dropped  # the first costs least here
    for (i, part), columns in cut.columns.items():
        heads, hidden = cut.spec.pruned[cut.blocks.index(i)]
        assert len(columns) == (heads * 8 if part == "attn" else hidden)
        assert columns.tolist() == sorted(columns.tolist())


def test_too_little_is_refused_with_the_least_that_works():
    with pytest.raises(InputError, match=r"keeps 0\.\d+ of the multiplications. Keep more"):
        choose_cut(SPEC, branches_of(SPEC), keep=0.05, side=64)
