"""k-NN against scikit-learn and by hand."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from densedino.evals.knn import vote


def test_a_vote_is_that_of_scikit_learn() -> None:
    from sklearn.neighbors import KNeighborsClassifier

    rng = np.random.default_rng(0)
    bank, queries = rng.normal(size=(80, 6)), rng.normal(size=(50, 6))
    labels = rng.integers(0, 4, 80)
    found = vote(
        torch.from_numpy(queries),
        torch.from_numpy(bank),
        torch.from_numpy(labels),
        num_classes=4,
        k=(5, 80),
        temperature=0.07,
    )
    unit = F.normalize(torch.from_numpy(bank), dim=1).numpy()
    for row, k in zip(found, (5, 80), strict=True):
        # Of unit vectors the squared distance is 2 − 2 cosine.
        theirs = KNeighborsClassifier(k, weights=lambda d: np.exp((1 - d**2 / 2) / 0.07)).fit(unit, labels)
        expected = theirs.predict(F.normalize(torch.from_numpy(queries), dim=1).numpy())
        np.testing.assert_array_equal(row.numpy(), expected)


def test_ties_go_to_the_nearest_and_k_may_exceed_the_bank() -> None:
    bank = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    found = vote(
        torch.tensor([[1.0, 1.0], [0.0, 1.0]]), bank, torch.tensor([1, 0]), num_classes=2, k=(9,), temperature=1e6
    )
    assert found.tolist()[0][1] == 0
