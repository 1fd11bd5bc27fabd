"""The golden files and key tables of heads, which lie beside the repository, and models of their tiny sizes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from densedino.heads.tapping import backbone_taps
from densedino.models.catalog import ViTSpec, create_model

if TYPE_CHECKING:
    from collections.abc import Callable

    from densedino.heads.tapping import TokensOf
    from densedino.models.vit import VisionTransformer

SPEC = Path(__file__).parents[3] / "shared" / "spec" / "heads"
TINY = ViTSpec(name="tiny", embed_dim=32, depth=4, num_heads=2, hidden_dim=64)


@dataclass(frozen=True)
class Golden:
    """One golden file."""

    arrays: dict[str, torch.Tensor]

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.arrays[name]

    def weights(self, prefix: str = "", *, without: str | None = None) -> dict[str, torch.Tensor]:
        """Under `w/<prefix>`, without those under `w/<without>`."""
        head = f"w/{prefix}"
        return {
            key.removeprefix(head): value
            for key, value in self.arrays.items()
            if key.startswith(head) and not (without and key.startswith(f"w/{without}"))
        }

    def backbone(self, prefix: str) -> VisionTransformer:
        """The tiny ViT with the file's weights."""
        model = create_model(replace(TINY))
        model.load_state_dict(self.weights(prefix), strict=True)
        return model

    def taps(self, prefix: str, layers: tuple[int, ...] = (0, 1, 2, 3)) -> TokensOf:
        return backbone_taps(self.backbone(prefix), layers)


@pytest.fixture(scope="session")
def specification() -> Path:
    if not SPEC.is_dir():
        pytest.skip(f"{SPEC} is not here")
    return SPEC


@pytest.fixture(scope="session")
def golden(specification: Path) -> Callable[[str], Golden]:
    def read(name: str) -> Golden:
        with np.load(specification / f"golden_{name}.npz") as file:
            return Golden({key: torch.from_numpy(file[key]) for key in file.files})

    return read


@pytest.fixture(scope="session")
def key_table(specification: Path) -> Callable[[str], dict[str, tuple[tuple[int, ...], str, str]]]:
    """{key: (shape, dtype, column "checkpoint")}."""

    def read(name: str) -> dict[str, tuple[tuple[int, ...], str, str]]:
        rows = [line.split("\t") for line in (specification / f"keys_{name}.tsv").read_text().splitlines()[1:]]
        return {
            key: (() if shape == "scalar" else tuple(map(int, shape.split("x"))), dtype, where)
            for key, shape, dtype, _, where in rows
        }

    return read
