from __future__ import annotations

import numpy as np
import pytest
import torch

from densedino.models.catalog import model_spec
from densedino.models.rope import RopeAugment
from densedino.pretrain.draws import draw


def table(places: range, *, step: int = 3, crops: range = range(2), name: str = "debug_vit") -> torch.Tensor:
    """[branch, crop, place]: who keeps which branch."""
    draws = draw(model_spec(name), seed=1, step=step, places=places, crops=crops, drop_path=0.3)
    out = torch.zeros(len(draws.kept), len(crops) * len(places), dtype=torch.bool)
    for branch, kept in enumerate(draws.kept):
        out[branch, kept.samples] = True
    return out.unflatten(1, (len(crops), len(places)))


@pytest.mark.parametrize("name", ["debug_vit", "debug_convnext"])
def test_a_samples_draws_do_not_depend_on_what_it_shares_a_batch_with(name: str) -> None:
    whole = table(range(12), name=name)
    parts = [table(places, name=name) for places in (range(5), range(5, 6), range(6, 12))]
    assert torch.equal(whole, torch.cat(parts, dim=2))
    assert torch.equal(whole[:, 1:], table(range(12), crops=range(1, 2), name=name))
    assert not torch.equal(whole, table(range(12), step=4, name=name))


def test_the_rate_is_the_rate_whatever_the_batch() -> None:
    alone = [table(range(place, place + 1), step=step) for place in range(8) for step in range(200)]
    assert abs(torch.stack(alone).float().mean().item() - 0.7) < 0.02


def test_a_convnexts_rate_rises_and_branches_are_scaled_by_what_is_kept() -> None:
    draws = draw(model_spec("debug_convnext"), seed=1, step=0, places=range(4000), crops=range(1), drop_path=0.4)
    for rate, kept in zip(np.linspace(0, 0.4, 5), draws.kept, strict=True):
        assert kept.scale == pytest.approx(1 / (1 - rate))
        assert abs(len(kept.samples) / 4000 - (1 - rate)) < 0.03


@pytest.mark.parametrize(("per_block", "number"), [(False, 1), (True, 2)])
def test_rope_is_drawn_alike_for_all_images_of_a_kind_of_crop(per_block: bool, number: int) -> None:
    def warps(places: range, crops: range) -> torch.Tensor:
        rope = RopeAugment(rescale=2.0, per_block=per_block)
        draws = draw(model_spec("debug_vit"), seed=1, step=3, places=places, crops=crops, rope=rope)
        return torch.stack(draws.warps)

    ours = warps(range(4), range(2))
    assert len(ours) == len(ours.unique(dim=0)) == number
    assert torch.equal(ours, warps(range(4, 8), range(2)))
    assert not torch.equal(ours, warps(range(4), range(2, 10)))
    assert draw(model_spec("debug_vit"), seed=1, step=3, places=range(4), crops=range(2)).warps == ()
