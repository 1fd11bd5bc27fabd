"""Files of tiny heads and of the backbone that they stand on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from densedino.heads.catalog import HEADS, create_head
from densedino.models.catalog import create_model

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="session")
def head_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """<name of a debug head>.pth, debug_vit.pth and debug_vit_swiglu.pth."""
    folder = tmp_path_factory.mktemp("heads")
    torch.manual_seed(0)
    for name in ("debug_vit", "debug_vit_swiglu"):
        torch.save(create_model(name).state_dict(), folder / f"{name}.pth")
    for name in HEADS:
        if name.startswith("debug"):
            torch.save(create_head(name).state_dict(), folder / f"{name}.pth")
    return folder
