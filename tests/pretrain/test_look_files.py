"""Looks written and read back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from densedino.pretrain.look_files import (
    LookRecord,
    as_photo,
    read_fixed,
    read_looks,
    read_patches,
    write_fixed,
    write_look,
)
from densedino.pretrain.looks import Sizes

if TYPE_CHECKING:
    from pathlib import Path


def test_a_look_is_read_as_it_was_written(tmp_path: Path) -> None:
    record = LookRecord(
        step=12,
        stage="gram",
        seconds=1.5,
        measures={"knn": 0.5},
        names=("a", "b"),
        grid=(2, 3),
        sizes=Sizes(images=64, bank=7),
    )
    patches = torch.randn(2, 2, 3, 4)
    write_look(tmp_path, record, patches=patches)
    assert read_looks(tmp_path) == [record]
    torch.testing.assert_close(read_patches(tmp_path, 12), patches, atol=1e-2, rtol=1e-3)


def test_looks_come_by_step_and_one_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    for step in (200, 10, 10, 123_456_789):
        write_look(tmp_path, LookRecord(step=step, stage="s", failed=f"at {step}"))
    assert [look.step for look in read_looks(tmp_path)] == [10, 200, 123_456_789]


def test_nothing_is_there_before_the_first_look(tmp_path: Path) -> None:
    assert read_looks(tmp_path) == []
    assert read_fixed(tmp_path) is None


def test_fixed_images_are_kept_as_photos(tmp_path: Path) -> None:
    image = torch.rand(3, 8, 8)
    write_fixed(tmp_path, [("a.jpg", image)], rgb=(0, 1, 2))
    found = read_fixed(tmp_path)
    assert found is not None
    assert found[0] == ["a.jpg"]
    torch.testing.assert_close(found[1][0].permute(2, 0, 1) / 255, image, atol=0.5 / 255 + 1e-6, rtol=0)


@pytest.mark.parametrize(
    ("channels", "rgb", "shown"), [(3, (2, 1, 0), [2, 1, 0]), (5, (3, 2, 1), [3, 2, 1]), (1, None, [0, 0, 0])]
)
def test_photos_show_the_channels_that_are_colours(channels: int, rgb: tuple[int, int, int], shown: list[int]) -> None:
    image = torch.rand(channels, 6, 6)
    photo = as_photo(image, rgb=rgb).permute(2, 0, 1).float() / 255
    assert photo.shape == (3, 6, 6)
    if rgb:
        torch.testing.assert_close(photo, image[shown], atol=0.01, rtol=0)


def test_channels_that_are_no_colours_are_stretched() -> None:
    photo = as_photo(0.4 + 0.01 * torch.rand(4, 16, 16), rgb=None)
    assert photo.min() == 0
    assert photo.max() == 255
