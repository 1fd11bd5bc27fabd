"""The PCA basis and the heat scale as mathematics: against exact solutions, and on tokens made by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from densedino.errors import InputError
from densedino.features.colours import PcaBasis, fit_pca, heat_colours, otsu_threshold


def decaying_tokens(n=400, d=48, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g) * torch.logspace(1, -2, d) + torch.randn(d, generator=g)


def none_on_border(tokens):
    return torch.zeros(len(tokens), dtype=torch.bool)


def test_components_are_the_exact_whitened_principal_components():
    tokens = decaying_tokens()
    basis = fit_pca(tokens, border=none_on_border(tokens), foreground=False)
    projected = basis.project(tokens)[:, 1:]
    u, s, _ = torch.linalg.svd((tokens - tokens.mean(0)).double(), full_matrices=False)
    exact = u[:, :3] * len(tokens) ** 0.5
    assert s[0] > s[3]
    for k in range(3):
        sign = torch.sign(exact[:, k] @ projected[:, k].double())
        torch.testing.assert_close(projected[:, k].double() * sign, exact[:, k], atol=2e-3, rtol=0)
    torch.testing.assert_close(projected.std(0, correction=0), torch.ones(3), atol=1e-3, rtol=0)


def test_the_same_tokens_give_the_same_basis_whatever_the_random_state():
    tokens = decaying_tokens()
    before = fit_pca(tokens, border=none_on_border(tokens))
    torch.manual_seed(123)
    state = torch.get_rng_state()
    after = fit_pca(tokens, border=none_on_border(tokens))
    assert torch.equal(before.weight, after.weight)
    assert torch.equal(state, torch.get_rng_state()), "making a picture must not disturb the user's random numbers"


def test_order_of_tokens_and_rounding_do_not_flip_colours():
    tokens = decaying_tokens()
    shuffle = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(1))
    first = fit_pca(tokens, border=none_on_border(tokens), foreground=False)
    other = fit_pca(tokens[shuffle] * (1 + 1e-6), border=none_on_border(tokens), foreground=False)
    a, b = (PcaBasis.colours(basis.project(tokens)) for basis in (first, other))
    torch.testing.assert_close(a, b, atol=5e-3, rtol=0)


@pytest.mark.parametrize("sign", [1, -1])
def test_background_is_the_side_with_more_of_it_on_the_border(sign):
    inside = torch.zeros(20, 20, dtype=torch.bool)
    inside[4:20, 5:15] = True  # a big thing that stands on the lower border
    border = torch.ones(20, 20, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    noise = torch.randn(20, 20, 16, generator=torch.Generator().manual_seed(0)) * 0.3
    tokens = noise + sign * 4 * inside[..., None] * torch.eye(16)[3]
    found = fit_pca(tokens.view(-1, 16), border=border.view(-1)).project(tokens)[..., 0] > 0
    assert torch.equal(found, inside)


@pytest.mark.parametrize("shape", [(1, 8), (2, 8), (3, 8), (400, 2), (400, 1)])
def test_few_tokens_or_channels_are_coloured_without_nan(shape):
    tokens = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    projected = fit_pca(tokens, border=none_on_border(tokens)).project(tokens)
    assert projected.shape == (shape[0], 4)
    assert projected.isfinite().all()


@pytest.mark.parametrize("value", [0.0, 1.0, -3e4])
def test_constant_tokens_are_mid_grey_and_all_foreground(value):
    tokens = torch.full((50, 16), value)
    projected = fit_pca(tokens, border=none_on_border(tokens)).project(tokens)
    torch.testing.assert_close(PcaBasis.colours(projected), torch.full((50, 3), 0.5), atol=0.01, rtol=0)
    assert (projected[:, 0] > 0).all()


def test_no_tokens_and_broken_tokens_are_refused():
    with pytest.raises(InputError, match="no valid tokens"):
        fit_pca(torch.empty(0, 8), border=torch.empty(0, dtype=torch.bool))
    tokens = decaying_tokens()
    tokens[3, 4] = float("nan")
    with pytest.raises(InputError, match="NaN"):
        fit_pca(tokens, border=none_on_border(tokens))


@given(st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=40))
@settings(max_examples=80, deadline=None)
def test_otsu_is_the_best_of_all_splits(values):
    x = torch.tensor(values, dtype=torch.float64)
    threshold = otsu_threshold(x)

    def within(part):
        return sum(float(((p - p.mean()) ** 2).sum()) for p in (x[part], x[~part]) if len(p))

    best = min(within(x > limit) for limit in x.tolist())
    assert within(x > threshold) <= best + 1e-6 * (1 + float(x.square().sum()))


def test_heat_scale_is_perceptually_uniform_and_in_gamut():
    rgb = heat_colours(torch.linspace(0, 1, 256)).double()
    assert rgb.min() >= 0 and rgb.max() <= 1
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_cone = torch.tensor(
        [
            [0.4122214708, 0.5363325363, 0.0514459929],
            [0.2119034982, 0.6806995451, 0.1073969566],
            [0.0883024619, 0.2817188376, 0.6299787005],
        ]
    ).double()
    to_lab = torch.tensor(
        [
            [0.2104542553, 0.7936177850, -0.0040720468],
            [1.9779984951, -2.4285922050, 0.4505937099],
            [0.0259040371, 0.7827717662, -0.8086757660],
        ]
    ).double()
    steps = ((linear @ to_cone.T) ** (1 / 3) @ to_lab.T).diff(dim=0)
    assert steps[:, 0].std() < 0.02 * steps[:, 0].mean(), "lightness must grow evenly"
    assert steps.norm(dim=1).max() < 2 * steps.norm(dim=1).min()


def test_heat_scale_holds_its_ends():
    out = heat_colours(torch.tensor([[-1.0, 0.0], [1.0, 7.0]]))
    assert out.shape == (2, 2, 3)
    assert torch.equal(out[0, 0], out[0, 1]) and torch.equal(out[1, 0], out[1, 1])
