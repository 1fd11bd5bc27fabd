"""The layer sweep scores every block with the best linear map."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

import densedino as dd
from densedino.adapters.labels import read_labelled
from densedino.adapters.sweep import Block, _ridge, sweep
from densedino.adapters.tasks import Task

if TYPE_CHECKING:
    from pathlib import Path


def blocks_of(folder: Path, task: Task, store: Path, *, resize: tuple[int, int] | None = None) -> list[Block]:
    dino = dd.load("debug_vit", weights="random", engine="eager", device="cpu", resize=resize)
    return sweep(dino, read_labelled(folder, task), store, limit=6)


def test_every_block_is_scored(masks: Path, depths: Path, classes: Path, tmp_path: Path) -> None:
    segments = blocks_of(masks, Task(kind="segmentation"), tmp_path / "a")
    assert [block.layer for block in segments] == [0, 1] and all(block.score > 50 for block in segments)
    assert segments == blocks_of(masks, Task(kind="segmentation"), tmp_path / "a")  # no seed in it
    metres = blocks_of(depths, Task(kind="depth", depth_unit=0.001, most_depth=9.0), tmp_path / "b")
    assert all(block.score < 0.7 for block in metres)  # the mean alone has 0.95
    told = blocks_of(classes, Task(kind="classification"), tmp_path / "c", resize=(48, 48))
    assert all(block.score == 100 for block in told)


def test_ridge_finds_a_linear_map() -> None:
    x = torch.randn(200, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 10.0, 0.1, 3.0]) + 5
    y = x @ torch.tensor([[1.0], [-0.5], [3.0], [0.0]]) + 2
    y[0] = torch.nan
    probe = _ridge(x, y, penalty=1e-9)
    torch.testing.assert_close((x @ probe.weight + probe.bias)[1:], y[1:], atol=1e-3, rtol=1e-3)
    assert float(probe.bias) == pytest.approx(2, abs=1e-2)
