"""Object discovery: a coloured box is found by all three, and boxes are counted as VOC counts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image

from densedino.errors import InputError
from densedino.evals.discovery import boxes_of_mask, find_objects, lost, one_click, token_cut
from densedino.evals.plan import Plan
from densedino.evals.run import evaluate

if TYPE_CHECKING:
    from pathlib import Path


def scene() -> tuple[torch.Tensor, np.ndarray]:
    """Patches of a background and of an object that are opposed, and where the object is."""
    torch.manual_seed(0)
    mask = np.zeros((8, 10), bool)
    mask[2:5, 3:7] = True
    direction = torch.randn(16)
    patches = torch.randn(8, 10, 16) * 0.1 + torch.where(torch.from_numpy(mask)[..., None], direction, -direction)
    return patches, mask


def test_all_find_the_object() -> None:
    patches, mask = scene()
    np.testing.assert_array_equal(token_cut(patches, tau=0.2), mask)
    np.testing.assert_array_equal(lost(patches, seeds=12), mask)
    np.testing.assert_array_equal(one_click(patches, place=(3, 4)), mask)


def test_the_cut_is_the_second_vector_of_the_graph() -> None:
    """By the symmetric problem instead of the generalised one."""
    patches, _ = scene()
    tokens = torch.nn.functional.normalize(patches.flatten(0, 1).double(), dim=1)
    weights = torch.where(tokens @ tokens.T > 0.2, 1.0, 1e-5)
    root = weights.sum(1).rsqrt()
    symmetric = torch.eye(80, dtype=torch.double) - root[:, None] * weights * root
    second = (torch.linalg.eigh(symmetric).eigenvectors[:, 1] * root).view(8, 10)
    split = (second > second.mean()).numpy()
    found = token_cut(patches, tau=0.2)
    assert (found == split).all() or (found == ~split).all()


def test_layouts(tmp_path: Path, silent: Any) -> None:
    assert boxes_of_mask(np.pad(np.full((2, 3), 255), 1)) == ((1.0, 1.0, 4.0, 3.0),)
    assert len(boxes_of_mask(np.array([[0, 1, 255, 2]]))) == 2
    voc = tmp_path / "voc"
    for name in ("Annotations", "JPEGImages"):
        (voc / name).mkdir(parents=True)
    image = np.full((96, 128, 3), 40, np.uint8)
    image[32:64, 48:96] = [230, 80, 30]
    Image.fromarray(image).save(voc / "JPEGImages/a.jpg")
    box = "<bndbox><xmin>49</xmin><ymin>33</ymin><xmax>96</xmax><ymax>64</ymax></bndbox>"
    (voc / "Annotations/a.xml").write_text(f"<annotation><object><name>x</name>{box}</object></annotation>")
    data = find_objects(voc)
    assert data.test[0].boxes == ((48.0, 32.0, 96.0, 64.0),)
    plan = Plan(protocol="discovery", data=voc, models=("raw",), output=tmp_path / "run")
    rows = {row["head"]: row["metrics"] for row in evaluate(plan, narrator=silent, workers=0)["rows"]}
    assert rows["one click"]["corloc"]["mean"] == 100 and set(rows) == {"TokenCut", "LOST", "one click"}
    (voc / "Annotations/a.xml").write_text("<annotation></annotation>")
    with pytest.raises(InputError, match=r"1 of 1 images have no object; the first is 'JPEGImages/a.jpg'"):
        find_objects(voc)
    with pytest.raises(InputError, match="neither"):
        find_objects(tmp_path)
