"""Metrics against torchmetrics, scikit-learn and their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from densedino.errors import InputError
from densedino.evals.metrics import boxes_iou, count_classes, count_depth, count_points, depth_of, iou_of, pck_of

RNG = np.random.default_rng(0)


@given(seed=st.integers(0, 10**6), classes=st.integers(2, 9), present=st.integers(1, 9))
@settings(max_examples=25, deadline=None)
def test_iou_is_that_of_torchmetrics_with_void_and_empty_classes(seed: int, classes: int, present: int) -> None:
    from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

    rng = np.random.default_rng(seed)
    present = min(present, classes)
    true = rng.integers(0, present, (3, 16, 12))
    predicted = np.where(rng.random(true.shape) < 0.5, true, rng.integers(0, present, true.shape))
    true[rng.random(true.shape) < 0.2] = 255
    parts = [count_classes(p, t, num_classes=classes, ignore=255) for p, t in zip(predicted, true, strict=True)]
    ours = iou_of({name: sum(part[name] for part in parts) for name in parts[0]})
    kept = true != 255
    p, t = torch.from_numpy(predicted[kept]), torch.from_numpy(true[kept])
    assert ours["miou"] == pytest.approx(100 * float(MulticlassJaccardIndex(classes)(p, t)), abs=1e-4)
    assert ours["pixel_accuracy"] == pytest.approx(100 * float((p == t).double().mean()))
    there = torch.bincount(t, minlength=classes) > 0
    recalls = MulticlassAccuracy(classes, average="none")(p, t)[there]
    assert ours["class_accuracy"] == pytest.approx(100 * float(recalls.mean()), abs=1e-4)


def test_an_image_of_void_alone_counts_nothing() -> None:
    counts = count_classes(np.zeros((4, 4), int), np.full((4, 4), 255), num_classes=3, ignore=255)
    assert all(not value.any() for value in counts.values())
    assert np.isnan(iou_of(counts)["miou"])


def test_a_label_that_is_no_class_is_refused() -> None:
    with pytest.raises(InputError, match=r"labels span 0 to 7; valid are 0 to 2, and 255 for void"):
        count_classes(np.zeros((2, 2), int), np.array([[0, 7], [1, 255]]), num_classes=3, ignore=255)
    with pytest.raises(InputError, match="differ in shape"):
        count_classes(np.zeros((2, 2), int), np.zeros((2, 3), int), num_classes=3)


def test_depth_is_that_of_its_definitions_and_of_scikit_learn() -> None:
    from sklearn.metrics import mean_absolute_percentage_error, root_mean_squared_error

    true = RNG.uniform(0.5, 10, (20, 30))
    predicted = true * RNG.uniform(0.6, 1.6, true.shape)
    valid = RNG.random(true.shape) < 0.7
    found = depth_of(count_depth(predicted, true, valid=valid))
    p, t = predicted[valid], true[valid]
    assert found["rmse"] == pytest.approx(root_mean_squared_error(t, p))
    assert found["abs_rel"] == pytest.approx(mean_absolute_percentage_error(t, p))
    assert found["rmse_log"] == pytest.approx(root_mean_squared_error(np.log(t), np.log(p)))
    d = np.log(p) - np.log(t)
    n = len(d)
    pairs = ((d[:, None] - d[None]) ** 2).sum() / (2 * n * n)  # Eigen et al., equation 2: over all pairs of pixels
    assert found["silog"] == pytest.approx(100 * np.sqrt(pairs))
    assert found["delta1"] == pytest.approx(np.mean(np.maximum(p / t, t / p) < 1.25))
    scaled = depth_of(count_depth(predicted * 3, true, valid=valid))
    assert scaled["silog"] == pytest.approx(found["silog"])
    with pytest.raises(InputError, match="0 valid depths"):
        count_depth(predicted, true, valid=np.zeros_like(valid))


def test_pck_counts_points_and_images() -> None:
    one = count_points(np.array([1.0, 10.0, 30.0]), scale=100.0, thresholds=(0.1, 0.2))
    two = count_points(np.array([1.0]), scale=100.0, thresholds=(0.1, 0.2))
    both = pck_of({name: one[name] + two[name] for name in one}, (0.1, 0.2))
    assert both == {
        "pck@0.1": 75.0,
        "pck@0.1_per_image": pytest.approx(100 * (2 / 3 + 1) / 2),
        "pck@0.2": 75.0,
        "pck@0.2_per_image": pytest.approx(100 * (2 / 3 + 1) / 2),
    }


def test_iou_of_boxes_is_that_of_torchvision() -> None:
    from torchvision.ops import box_iou

    low = RNG.uniform(0, 50, (8, 2))
    boxes = np.concatenate([low, low + RNG.uniform(1, 50, (8, 2))], axis=1)
    theirs = box_iou(torch.from_numpy(boxes[:1]), torch.from_numpy(boxes))[0].numpy()
    np.testing.assert_allclose(boxes_iou(boxes[0], boxes), theirs)
