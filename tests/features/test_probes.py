"""Probes against answers known beforehand, and scikit-learn-free reference computations."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from densedino.errors import InputError
from densedino.features.probes import confusion_matrix, fit_linear_probe, knn_vote, mean_iou, patch_shares


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("temperature", [None, 0.07])
def test_separate_clusters_are_told_apart(temperature: float | None) -> None:
    labels = torch.arange(4).repeat_interleave(30)
    bank = 5 * torch.eye(4, 16)[labels] + noise(120, 16)
    queries = 5 * torch.eye(4, 16) + noise(4, 16, seed=2)
    assert knn_vote(queries, bank, labels, num_classes=4, temperature=temperature).tolist() == [0, 1, 2, 3]


def test_one_neighbour_is_the_nearest() -> None:
    bank, labels = noise(50, 8), torch.arange(50) % 5
    queries = noise(20, 8, seed=1)
    nearest = (F.normalize(queries, dim=1) @ F.normalize(bank, dim=1).T).argmax(1)
    assert torch.equal(knn_vote(queries, bank, labels, num_classes=5, k=1), labels[nearest])


def test_votes_are_weighed_by_the_exponential_of_the_cosine() -> None:
    bank, labels = noise(60, 6), torch.randint(0, 7, (60,), generator=torch.Generator().manual_seed(1))
    queries = noise(30, 6, seed=2)
    expected = []
    for q in F.normalize(queries, dim=1).double():
        cosines = F.normalize(bank, dim=1).double() @ q
        votes = [0.0] * 7
        for i in cosines.topk(20).indices.tolist():
            votes[int(labels[i])] += math.exp(float(cosines[i]) / 0.07)
        expected.append(max(range(7), key=votes.__getitem__))
    assert knn_vote(queries, bank, labels, num_classes=7).tolist() == expected
    assert knn_vote(queries, bank, labels, num_classes=7, block=7).tolist() == expected


def test_of_equal_votes_the_nearest_wins() -> None:
    bank = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.3, 0.9]])
    labels = torch.tensor([1, 1, 0, 0])
    query = torch.tensor([[1.0, 0.05]])
    assert knn_vote(query, bank, labels, num_classes=2, k=4, temperature=None).tolist() == [1]
    assert knn_vote(query.flip(1), bank, labels, num_classes=2, k=4, temperature=None).tolist() == [0]


def test_a_small_bank_and_no_queries_are_fine_and_wrong_labels_are_not() -> None:
    assert knn_vote(noise(3, 4), noise(2, 4), torch.tensor([1, 1]), num_classes=2).tolist() == [1, 1, 1]
    assert len(knn_vote(noise(0, 4), noise(2, 4), torch.tensor([1, 1]), num_classes=2)) == 0
    for labels in (torch.tensor([0, 2]), torch.tensor([0]), torch.tensor([-1, 0])):
        with pytest.raises(InputError, match="from 0 to 1"):
            knn_vote(noise(1, 4), noise(2, 4), labels, num_classes=2)


def test_confusion_counts_true_by_predicted_and_leaves_out_the_ignored() -> None:
    true = torch.tensor([[0, 1, 2], [2, 255, 1]])
    predicted = torch.tensor([[0, 2, 2], [1, 0, 1]])
    expected = torch.tensor([[1, 0, 0], [0, 1, 1], [0, 1, 1]])
    found = confusion_matrix(predicted, true, num_classes=3, ignore=255)
    assert found.dtype == torch.int64
    assert torch.equal(found, expected)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=60), st.integers(0, 60))
def test_confusions_add_up(pairs: list[tuple[int, int]], cut: int) -> None:
    true, predicted = torch.tensor(pairs).T
    whole = confusion_matrix(predicted, true, num_classes=5)
    parts = [confusion_matrix(predicted[part], true[part], num_classes=5) for part in (slice(cut), slice(cut, None))]
    assert torch.equal(parts[0] + parts[1], whole)
    assert int(whole.sum()) == len(pairs)


def test_a_label_that_is_no_class_is_refused() -> None:
    with pytest.raises(InputError, match="valid are 0 to 2 and 255"):
        confusion_matrix(torch.tensor([0]), torch.tensor([3]), num_classes=3, ignore=255)
    with pytest.raises(InputError, match="differ in shape"):
        confusion_matrix(torch.zeros(2, 2), torch.zeros(2, 3), num_classes=3)


def test_mean_iou_follows_its_definition() -> None:
    assert mean_iou(torch.tensor([[3, 1], [2, 4]])) == pytest.approx((3 / 6 + 4 / 7) / 2)
    assert mean_iou(torch.tensor([[3, 1, 0], [2, 4, 0], [0, 0, 0]])) == pytest.approx((3 / 6 + 4 / 7) / 2)
    assert mean_iou(torch.eye(3, dtype=torch.int64)) == 1
    assert math.isnan(mean_iou(torch.zeros(2, 2, dtype=torch.int64)))


def test_shares_of_patches_count_pixels() -> None:
    labels = torch.tensor([[0, 0, 1, 1], [0, 2, 1, 1], [9, 9, 2, 9], [9, 9, 2, 0]])
    shares = patch_shares(labels, grid=(2, 2), num_classes=3, ignore=9)
    expected = torch.tensor([[[0.75, 0, 0.25], [0, 1, 0]], [[0, 0, 0], [1 / 3, 0, 2 / 3]]])
    torch.testing.assert_close(shares, expected)


def test_shares_where_patches_are_no_whole_number_of_pixels() -> None:
    shares = patch_shares(torch.zeros(7, 5, dtype=torch.int64), grid=(3, 4), num_classes=2, ignore=9)
    assert torch.equal(shares[..., 0], torch.ones(3, 4))


def test_a_linear_probe_finds_what_is_linear_and_draws_nothing() -> None:
    x = noise(2000, 6) * torch.tensor([1, 10, 0.1, 1, 1, 1]) + 5
    truth = (x - 5) @ noise(6, 4, seed=3)
    y = F.one_hot(truth.argmax(1), 4).float()
    state = torch.get_rng_state()
    probe, entropy = fit_linear_probe(x, y, penalty=1e-5)
    again, _ = fit_linear_probe(x, y, penalty=1e-5)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(probe.weight, again.weight)
    predicted = (x @ probe.weight + probe.bias).argmax(1)
    assert float((predicted == truth.argmax(1)).float().mean()) > 0.98
    assert entropy < 0.15


def test_the_probe_is_at_the_minimum_of_its_loss() -> None:
    x, y = noise(300, 5), torch.softmax(noise(300, 3, seed=1), -1)
    probe, _ = fit_linear_probe(x, y, penalty=1e-2)
    mean, std = x.mean(0), x.std(0, correction=0)
    weight = (probe.weight * std[:, None]).requires_grad_()
    bias = (probe.bias + mean @ probe.weight).requires_grad_()
    loss = F.cross_entropy((x - mean) / std @ weight + bias, y) + 1e-2 / 2 * weight.square().sum()
    loss.backward()
    assert weight.grad is not None
    assert bias.grad is not None
    assert float(weight.grad.abs().max()) < 1e-4
    assert float(bias.grad.abs().max()) < 1e-4


def test_tokens_without_labels_do_not_count_and_some_must_have_them() -> None:
    x, y = noise(100, 4), F.one_hot(torch.arange(100) % 2, 2).float()
    y[50:] = 0
    probe, _ = fit_linear_probe(x, y)
    alone, _ = fit_linear_probe(x[:50], y[:50])
    torch.testing.assert_close(probe.weight, alone.weight)
    with pytest.raises(InputError, match="needs labels"):
        fit_linear_probe(x, torch.zeros(100, 2))


def test_prediction_has_the_size_of_the_image_and_follows_the_patches() -> None:
    x = torch.zeros(4, 6, 2)
    x[:, :3, 0] = 1
    x[:, 3:, 1] = 1
    labels = torch.zeros(4, 6, dtype=torch.int64)
    labels[:, 3:] = 1
    probe, _ = fit_linear_probe(x.flatten(0, 1), F.one_hot(labels.flatten(), 2).float())
    predicted = probe.predict(x, (40, 60))
    assert torch.equal(predicted, labels.repeat_interleave(10, 0).repeat_interleave(10, 1))
