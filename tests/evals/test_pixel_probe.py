"""The pixel probe: its interpolation, and that training ends where a convex solver does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from densedino.errors import InputError
from densedino.evals.pixel_probe import Fitting, PixelProbe, fit_probe, standardisation
from densedino.evals.tokens import TokenMap
from densedino.features.tokens import upsample_tokens


def a_map(seed: int, *, grid: tuple[int, int] = (4, 6), dim: int = 5) -> TokenMap:
    array = np.random.default_rng(seed).normal(3, 2, (*grid, dim)).astype(np.float16)
    return TokenMap(array, source_size=(60, 90), input_size=(60, 90), stride=16)


def test_outputs_are_interpolated_as_features_are() -> None:
    tokens = a_map(0)
    probe = PixelProbe(torch.randn(5, 3), torch.randn(3))
    expected = upsample_tokens(tokens.float()[None], (60, 90), extent=(60, 90), stride=16)[0].permute(1, 2, 0)
    expected = expected @ probe.weight + probe.bias
    torch.testing.assert_close(probe(tokens), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(probe(tokens, rows=slice(10, 20)), expected[10:20], atol=1e-4, rtol=1e-4)


def test_points_go_to_tokens_and_back() -> None:
    tokens = TokenMap(np.zeros((4, 4, 1), np.float16), source_size=(128, 128), input_size=(64, 64), stride=16)
    points = np.array([[16.0, 48.0], [0.0, 128.0]])
    np.testing.assert_allclose(tokens.to_tokens(points), [[0, 1], [-0.5, 3.5]])
    np.testing.assert_allclose(tokens.to_pixels(tokens.to_tokens(points)), points)


def test_training_ends_where_newton_does() -> None:
    """The loss of all pixels, as an independent full-batch solver finds it."""
    torch.manual_seed(0)
    maps = [a_map(i) for i in range(6)]
    truth = PixelProbe(torch.randn(5, 3), torch.zeros(3))
    targets = [torch.distributions.Categorical(logits=truth(one)).sample() for one in maps]
    every = torch.cat([PixelProbe(torch.eye(5), torch.zeros(5))(one).reshape(-1, 5) for one in maps]).double()
    every_token = torch.cat([one.float().flatten(0, 1) for one in maps]).double()
    mean, deviation = every_token.mean(0), every_token.std(0, correction=0)
    every, wanted = (every - mean) / deviation, torch.cat([one.flatten() for one in targets])
    weight = torch.zeros(6, 3, dtype=torch.double, requires_grad=True)
    solver = torch.optim.LBFGS([weight], max_iter=200, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def objective(weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(every @ weight + bias, wanted) + 1e-3 / 2 * weight.square().sum()

    def closure() -> torch.Tensor:
        solver.zero_grad()
        value = objective(weight[:5], weight[5])
        value.backward()
        return value

    solver.step(closure)
    best = float(closure().detach())
    for seed in (0, 1):
        probe = fit_probe(
            lambda i: maps[i],
            lambda i: targets[i],
            count=6,
            outputs=3,
            loss=F.cross_entropy,
            fitting=Fitting(steps=800, batch=6, pixel_stride=2, ridge=1e-3),
            seed=seed,
        )
        standard = probe.weight.double() * deviation[:, None]
        found = float(objective(standard, probe.bias + mean @ probe.weight.double()))
        assert found == pytest.approx(best, rel=1e-2)


def test_images_of_several_sizes_and_channels_that_never_change() -> None:
    maps = [a_map(0), a_map(1, grid=(3, 3))]
    maps[1].source_size = maps[1].input_size = (48, 48)
    for one in maps:
        one.tensor[..., 0] = 7
    mean, deviation, _ = standardisation(lambda i: maps[i], 2)
    assert (float(mean[0]), float(deviation[0])) == (7, 1)
    targets = [torch.zeros(60, 90, dtype=torch.long), torch.ones(48, 48, dtype=torch.long)]
    probe = fit_probe(
        lambda i: maps[i],
        lambda i: targets[i],
        count=2,
        outputs=2,
        loss=F.cross_entropy,
        fitting=Fitting(steps=5, batch=2),
        seed=0,
    )
    assert probe(maps[1]).shape == (48, 48, 2)
    maps[0].tensor[0, 0, 1] = float("nan")
    with pytest.raises(InputError, match="not finite"):
        standardisation(lambda i: maps[i], 2)
