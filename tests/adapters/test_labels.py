"""Labelled examples: a part is drawn by the seed, and every fault of the labels names its file."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from densedino.adapters.labels import Window, read_labelled, read_truth, sample_labels
from densedino.adapters.tasks import NOT_COUNTED, Task
from densedino.errors import ImageError, InputError
from densedino.images.transforms import Transform

if TYPE_CHECKING:
    from pathlib import Path

SEGMENTS = Task(kind="segmentation")


def write(path: Path, mask: np.ndarray) -> None:
    Image.fromarray(mask.astype(np.uint8)).save(path)


def test_what_is_found(masks: Path, depths: Path, classes: Path) -> None:
    found = read_labelled(masks, SEGMENTS)
    assert (len(found.train), len(found.val)) == (6, 2)
    assert found.task.classes == ("0", "1")
    found = read_labelled(depths, Task(kind="depth", depth_unit=0.001, most_depth=9))
    truth = read_truth(found.task, found.train[0])
    assert isinstance(truth, torch.Tensor) and 1 <= float(truth[10, 10]) < 3 and float(truth[0, 0]) == 0
    found = read_labelled(classes, Task(kind="classification"))
    assert found.task.classes == ("green", "red") and [e.label for e in found.train] == [0, 0, 0, 1, 1, 1]


def test_a_part_is_drawn_by_the_seed(masks: Path) -> None:
    one, same, other = (read_labelled(masks, SEGMENTS, fraction=0.5, seed=s).train for s in (0, 0, 3))
    assert len(one) == 3 and one == same and one != other
    assert len(read_labelled(masks, SEGMENTS, fraction=1e-9).train) == 1
    with pytest.raises(InputError, match="fraction 0"):
        read_labelled(masks, SEGMENTS, fraction=0)


def test_faults_name_the_file(masks: Path) -> None:
    def fault(match: str, **options: int) -> None:
        with pytest.raises((InputError, ImageError), match=match):
            read_labelled(masks, SEGMENTS, **options)

    good = np.array(Image.open(masks / "masks" / "3.png"))
    wrong = good.copy()
    wrong[10, 10] = 7
    write(masks / "masks" / "3.png", wrong)  # 3 validates
    fault(r"masks/3\.png: it has the label 7; valid are 0 to 1, and 255")
    write(masks / "masks" / "3.png", good)
    write(masks / "masks" / "2.png", wrong)
    fault(r"masks/2\.png: it has the label 7; valid are 0 to 3", classes=4)
    write(masks / "masks" / "2.png", good[:-1])
    fault(r"masks/2\.png: it has 63×80 .* image .*images/2\.png has 64×80")
    Image.fromarray(np.zeros((64, 80, 3), np.uint8)).save(masks / "masks" / "2.png")
    fault(r"2\.png.*3 channels")
    (masks / "masks" / "2.png").write_bytes(b"nothing")
    fault(r"2\.png.*cannot be read")
    (masks / "masks" / "2.png").unlink()
    fault(r"no mask.*2\.png")


def test_one_class_is_nothing_to_learn(masks: Path) -> None:
    for path in (masks / "masks").iterdir():
        write(path, np.full((64, 80), 4))
    with pytest.raises(InputError, match=r"only class 4, as .*0\.png"):
        read_labelled(masks, SEGMENTS)
    for path in (masks / "masks").iterdir():
        write(path, np.full((64, 80), 255))
    with pytest.raises(InputError, match="only the label 255"):
        read_labelled(masks, SEGMENTS)


def test_depth_in_another_unit_is_told(depths: Path) -> None:
    with pytest.raises(InputError, match=r"0\.png: no depth.*--depth-unit 0\.001"):
        read_labelled(depths, Task(kind="depth"))


def test_labels_of_an_upright_image_are_compared_upright(masks: Path) -> None:
    image = Image.open(masks / "images" / "0.png").transpose(Image.Transpose.ROTATE_90)
    (masks / "images" / "0.png").unlink()
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(masks / "images" / "0.jpg", exif=exif)
    assert len(read_labelled(masks, SEGMENTS).train) == 6


@settings(max_examples=30, deadline=None)
@given(
    height=st.integers(20, 60), width=st.integers(20, 60), top=st.integers(0, 30), left=st.integers(0, 30),
    mirrored=st.booleans(),
)  # fmt: skip
def test_labels_are_those_under_the_pixels(height: int, width: int, top: int, left: int, mirrored: bool) -> None:
    """At native size a window sampled at its own pixels is a crop, and what is beyond the picture does not count."""
    geometry = Transform(mean=(0.5,), std=(0.5,)).geometry(height, width)
    truth = torch.randint(0, 5, (height, width))
    window = Window(top, left, 32, 32, mirrored)
    taken = sample_labels(SEGMENTS, truth, window, (32, 32), geometry=geometry, source=(height, width))
    expected = torch.full((96, 96), NOT_COUNTED)
    expected[:height, :width] = truth
    expected = expected[top : top + 32, left : left + 32]
    assert torch.equal(taken, expected.flip(1) if mirrored else expected)
