"""Homographies: points go where the matrix says, also out of the image."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from densedino.errors import InputError
from densedino.evals.homography import find_homographies, project
from densedino.evals.plan import Plan
from densedino.evals.run import evaluate

if TYPE_CHECKING:
    from pathlib import Path


def test_a_projection() -> None:
    matrix = np.array([[2.0, 0, 1], [0, 1, 0], [0, 0.5, 1]])
    np.testing.assert_allclose(project(matrix, np.array([[1.0, 2.0]])), [[1.5, 1.0]])


def test_hpatches(tmp_path: Path, silent: Any) -> None:
    rng = np.random.default_rng(0)
    wide = np.kron(rng.integers(0, 255, (6, 10, 3)), np.ones((16, 16, 1))).astype(np.uint8)
    folder = tmp_path / "v_wall"
    folder.mkdir()
    Image.fromarray(wide[:, :128]).save(folder / "1.ppm")
    Image.fromarray(wide[:, 32:]).save(folder / "2.ppm")
    np.savetxt(folder / "H_1_2", [[1, 0, -32], [0, 1, 0], [0, 0, 1]])
    data = find_homographies(tmp_path)
    pair = data.pairs[0]
    assert pair.scale == 128 and 0 < len(pair.source_points) < 256
    assert all(
        x0 - 32 == x1 and y0 == y1 for (x0, y0), (x1, y1) in zip(pair.source_points, pair.target_points, strict=True)
    )
    plan = Plan(protocol="homography", data=tmp_path, models=("raw",), output=tmp_path / "run")
    assert evaluate(plan, narrator=silent, workers=0)["rows"][0]["metrics"]["pck@0.1"]["mean"] > 30
    (folder / "H_1_2").write_text("1 2 3")
    with pytest.raises(InputError, match="no matrix of 3×3"):
        find_homographies(tmp_path)
    (folder / "2.ppm").unlink()
    with pytest.raises(InputError, match="needs images 1 and 2"):
        find_homographies(tmp_path)
    with pytest.raises(InputError, match="HPatches"):
        find_homographies(folder)
