"""Meters against answers known beforehand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from densedino.errors import InputError
from densedino.pretrain.losses import gram_loss
from densedino.pretrain.meters import (
    cls_patch_cosine,
    coherence,
    demand_entropy,
    drift_matrix,
    effective_rank,
    feature_std,
    near_and_far,
    patch_similarity,
    similarity_drift,
    target_entropy,
)
from densedino.pretrain.prototypes import PrototypeTargets


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rotation(dim: int) -> torch.Tensor:
    return torch.linalg.qr(noise(dim, dim, seed=1)).Q


def test_deviation_is_0_for_collapsed_and_1_for_spread_features() -> None:
    assert feature_std(torch.ones(50, 16)) == pytest.approx(0, abs=1e-6)
    assert feature_std(noise(4000, 16)) == pytest.approx(1, abs=0.02)
    assert feature_std(torch.cat([torch.eye(8), -torch.eye(8)])) == pytest.approx(1, abs=1e-6)


@given(scale=st.floats(1e-3, 1e3))
def test_deviation_and_rank_do_not_depend_on_scale(scale: float) -> None:
    x = noise(40, 12)
    assert feature_std(scale * x) == pytest.approx(feature_std(x), rel=1e-4)
    assert effective_rank(scale * x) == pytest.approx(effective_rank(x), rel=1e-4)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_effective_rank_of_equal_singular_values_is_the_rank(rank: int) -> None:
    q = torch.linalg.qr(noise(64, rank)).Q
    assert effective_rank(q @ rotation(16)[:rank]) == pytest.approx(rank, rel=1e-3)


def test_effective_rank_follows_its_definition() -> None:
    values = torch.tensor([4.0, 2.0, 1.0, 1.0])
    shares = values / 8
    expected = math.exp(-float((shares * shares.log()).sum()))
    assert effective_rank(torch.diag(values) @ rotation(4)) == pytest.approx(expected, rel=1e-4)


def test_effective_rank_of_nothing_is_finite() -> None:
    assert math.isfinite(effective_rank(torch.zeros(5, 3)))


def test_demand_is_even_without_bias_and_nil_if_one_prototype_takes_all() -> None:
    assert demand_entropy(torch.zeros(64)) == pytest.approx(1)
    one = torch.zeros(64)
    one[3] = -1000
    assert demand_entropy(one) == pytest.approx(0, abs=1e-6)
    half = torch.where(torch.arange(64) < 8, 0.0, 1000.0)
    assert demand_entropy(half) == pytest.approx(math.log(8) / math.log(64))


def test_demand_is_read_from_the_bias_of_real_targets() -> None:
    prototypes = torch.nn.functional.normalize(noise(32, 8), dim=-1)
    spread = PrototypeTargets(torch.nn.functional.normalize(noise(256, 8, seed=2), dim=-1), prototypes, temperature=0.1)
    alike = PrototypeTargets(prototypes[:1].expand(256, 8) + 0.01 * noise(256, 8), prototypes, temperature=0.1)
    assert demand_entropy(spread.bias) > 0.9 > 0.5 > demand_entropy(alike.bias)


def test_target_entropy_is_that_of_the_softmax() -> None:
    prototypes = torch.nn.functional.normalize(noise(32, 8), dim=-1)
    targets = PrototypeTargets(noise(20, 8, seed=2), prototypes, temperature=0.5)
    probabilities = torch.softmax(targets.features @ prototypes.T + targets.bias, -1)
    expected = float(-(probabilities * probabilities.log()).sum(-1).mean()) / math.log(32)
    assert target_entropy(targets) == pytest.approx(expected, rel=1e-5)
    assert 0 < target_entropy(targets, samples=3) < 1
    with pytest.raises(InputError, match="no targets"):
        target_entropy(PrototypeTargets(noise(0, 8), prototypes, temperature=0.5))


def test_similarity_has_a_diagonal_of_ones() -> None:
    similarity = patch_similarity(noise(2, 9, 5))
    torch.testing.assert_close(similarity.diagonal(dim1=1, dim2=2), torch.ones(2, 9))
    torch.testing.assert_close(similarity, similarity.mT)


@given(scale=st.floats(0.1, 10))
def test_drift_is_nil_where_only_the_basis_or_the_scale_changed(scale: float) -> None:
    x = noise(3, 16, 8)
    drift = similarity_drift(scale * x @ rotation(8), x)
    assert drift.structure == pytest.approx(0, abs=1e-5)
    assert drift.distance == pytest.approx(0, abs=1e-9)


def test_drift_is_whole_where_nothing_is_left_and_grows_with_noise() -> None:
    x = noise(4, 100, 32)
    assert similarity_drift(noise(4, 100, 64, seed=5), x).structure == pytest.approx(1, abs=0.05)
    drifts = [similarity_drift(x + level * noise(4, 100, 32, seed=6), x).structure for level in (0.0, 0.3, 1.0, 3.0)]
    assert drifts == sorted(drifts)
    assert similarity_drift(torch.ones(4, 100, 8), x).structure == pytest.approx(1), "constant patches keep no order"


def test_distance_is_the_gram_loss_without_the_diagonal() -> None:
    x, y = noise(2, 10, 6), noise(2, 10, 6, seed=3)
    expected = float(gram_loss(x, y, normalized=True, img_level=True)) * 100 / 90
    assert similarity_drift(x, y).distance == pytest.approx(expected, rel=1e-5)


def test_drift_asks_for_the_same_images() -> None:
    with pytest.raises(InputError, match="same images"):
        similarity_drift(noise(2, 9, 4), noise(2, 16, 4))


def test_drift_matrix_is_drift_pair_by_pair() -> None:
    looks = [noise(3, 12, 6, seed=s) for s in range(4)]
    matrix = drift_matrix(looks)
    for i in range(4):
        for j in range(4):
            expected = 0.0 if i == j else similarity_drift(looks[i], looks[j]).structure
            assert float(matrix[i, j]) == pytest.approx(expected, abs=1e-6)


def test_near_and_far_of_a_picture_with_two_halves() -> None:
    patches = torch.zeros(1, 4, 8, 2)
    patches[:, :, :4, 0] = 1
    patches[:, :, 4:, 1] = 1
    near, far = near_and_far(patches)
    assert near == pytest.approx(1 - 4 / (4 * 7 + 3 * 8)), "4 of the pairs of neighbours lie across the border"
    # Far: at least 4 columns apart (never alike), or at least 2 rows apart and less than 4 columns (alike if same half)
    alike = sum(
        (abs(y - b) >= 2 or abs(x - a) >= 4) and (x < 4) == (a < 4)
        for y in range(4)
        for x in range(8)
        for b in range(4)
        for a in range(8)
    )
    every = sum(
        abs(y - b) >= 2 or abs(x - a) >= 4 for y in range(4) for x in range(8) for b in range(4) for a in range(8)
    )
    assert far == pytest.approx(alike / every)
    with pytest.raises(InputError, match="neighbours"):
        near_and_far(torch.ones(1, 1, 8, 2))


def test_coherence_falls_with_noise_and_artefacts_and_not_with_what_is_common() -> None:
    smooth = torch.nn.functional.interpolate(noise(4, 16, 3, 3), (12, 12), mode="bilinear").permute(0, 2, 3, 1)
    assert coherence(smooth + 3 * noise(4, 1, 1, 16, seed=5)) == pytest.approx(coherence(smooth), abs=1e-5)
    assert coherence(smooth + noise(4, 12, 12, 16, seed=4)) < 0.8 * coherence(smooth)
    artefacts = torch.where(torch.rand(4, 12, 12, 1, generator=torch.Generator().manual_seed(1)) < 0.2, 5.0, smooth)
    assert coherence(artefacts) < 0.8 * coherence(smooth)
    assert coherence(noise(8, 20, 20, 64)) == pytest.approx(0, abs=0.02)
    assert coherence(torch.ones(2, 4, 4, 3)) == pytest.approx(0, abs=1e-6), "constant patches have nothing left"


def test_cosine_of_cls_and_patches() -> None:
    cls = torch.tensor([[1.0, 0.0]])
    patches = torch.tensor([[[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0], [1.0, 1.0]]])
    assert cls_patch_cosine(cls, patches) == pytest.approx((1 + 0 - 1 + 2**-0.5) / 4)
