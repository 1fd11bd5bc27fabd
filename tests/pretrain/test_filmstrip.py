"""PCA pictures over time."""

from __future__ import annotations

import torch

from densedino.pretrain.filmstrip import filmstrip


def patches(seed: int = 0, dim: int = 16) -> torch.Tensor:
    coarse = torch.randn(1, dim, 4, 4, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, (10, 8), mode="bilinear")[0].permute(1, 2, 0)


def test_what_only_turns_keeps_its_colours() -> None:
    x = patches()
    turn = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(5))).Q
    strip = filmstrip([x @ turn, -3 * x, torch.cat([x, 0 * x], -1), x], side=40).float()
    assert strip.shape == (4, 40, 32, 3)
    for frame in strip[:-1]:
        assert float((frame - strip[-1]).abs().mean()) < 2


def test_what_changes_changes_and_the_same_gives_the_same() -> None:
    strip = filmstrip([patches(1), patches(0)], side=32)
    assert float((strip[0].float() - strip[1].float()).abs().mean()) > 20
    assert torch.equal(strip, filmstrip([patches(1), patches(0)], side=32))


def test_constant_patches_are_one_colour() -> None:
    strip = filmstrip([torch.ones(4, 4, 6), torch.ones(4, 4, 6)], side=8)
    assert int(strip.max()) - int(strip.min()) <= 1
