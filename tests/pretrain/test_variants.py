from __future__ import annotations

import math

import pytest
import torch

from densedino.config import from_dict, to_dict
from densedino.errors import InputError
from densedino.pretrain.contradictions import find_contradictions
from densedino.pretrain.settings import RunConfig
from densedino.pretrain.step import step_values
from densedino.pretrain.variants import channel_statistics, with_batch_size, with_channels, with_steps
from densedino.recipes import RECIPES, recipe

OURS = [name for name, (module, _) in RECIPES.items() if module == "one_machine"]


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("steps", [30, 1000])
def test_another_length_is_the_same_course(name, steps):
    before = recipe(name)
    after = with_steps(before, steps)
    assert sum(stage.steps for stage in after.stages) == steps
    assert find_contradictions(after) == []
    if steps < 1000:
        return
    for old, new in zip(before.stages, after.stages, strict=True):
        for share in (0.0, 0.3, 0.7, 1.0):
            one = step_values(old, round(share * (old.steps - 1)))
            other = step_values(new, round(share * (new.steps - 1)))
            assert math.isclose(one.momentum, other.momentum, abs_tol=2e-3)
            assert math.isclose(one.lr, other.lr, abs_tol=0.1 * old.optimizer.lr(old.steps // 2) + 1e-4)


def test_the_same_length_is_the_same_run():
    run = recipe("debug")
    assert with_steps(run, sum(stage.steps for stage in run.stages)) == run
    with pytest.raises(InputError, match="2 steps for 3 stages"):
        with_steps(run, 2)


def test_another_batch_goes_through_all_stages():
    run = with_batch_size(recipe("vitt16_small"), 24)
    assert [stage.batch_size for stage in run.stages] == [24, 24, 12]
    assert [stage.losses.koleo_group_size for stage in run.stages] == [8, 8, 4]
    assert find_contradictions(run) == []
    assert with_batch_size(recipe("vitt16_small"), 128) == recipe("vitt16_small")


def test_other_channels_go_through_all_resolutions():
    run = with_channels(recipe("debug"), mean=(0.5,) * 5, std=(0.2,) * 5, rgb=(2, 1, 0))
    crops = [r.crops for stage in run.stages for r in stage.resolutions]
    assert run.in_chans == 5
    assert {(c.mean, c.std, c.rgb) for c in crops} == {((0.5,) * 5, (0.2,) * 5, (2, 1, 0))}
    assert find_contradictions(run) == []
    assert from_dict(RunConfig, to_dict(run)) == run


class Made:
    def __init__(self, pictures):
        self.pictures = pictures

    def __len__(self):
        return len(self.pictures)

    def name(self, index):
        return str(index)

    def read(self, index):
        return self.pictures[index]


def test_statistics_are_those_of_the_pixels():
    a = torch.randint(0, 256, (2, 8, 8), dtype=torch.uint8)
    b = torch.rand(2, 8, 8)
    b[0, 0, 0] = torch.nan
    mean, std = channel_statistics([Made([a]), Made([b])])
    for channel in range(2):
        pixels = torch.cat([(a[channel] / 255).flatten(), b[channel].flatten()])
        pixels = pixels[pixels.isfinite()].double()
        assert math.isclose(mean[channel], pixels.mean(), rel_tol=5e-3)
        assert math.isclose(std[channel], pixels.std(correction=0), rel_tol=5e-3)
    assert channel_statistics([Made([torch.full((1, 2, 2), 32768, dtype=torch.uint16)])]) == ((0.5,), (0.001,))


def test_few_pictures_of_many_are_read():
    read = []

    class Counting(Made):
        def read(self, index):
            read.append(index)
            return torch.zeros(3, 2, 2)

    channel_statistics([Counting(range(1000))], images=10)
    assert read == list(range(50, 1000, 100))
