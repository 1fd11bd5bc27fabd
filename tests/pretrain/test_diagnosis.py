"""What the meters are taken to say."""

from __future__ import annotations

import pytest

from densedino.pretrain.diagnosis import best_dense_look, gram_verdict, health
from densedino.pretrain.look_files import LookRecord


def looks(**series: list[float]) -> list[LookRecord]:
    count = len(next(iter(series.values())))
    return [
        LookRecord(step=100 * i, stage="s", measures={name: values[i] for name, values in series.items()})
        for i in range(count)
    ]


RISING = [0.30, 0.40, 0.50, 0.60, 0.62, 0.64, 0.66]


def test_too_few_looks_say_nothing() -> None:
    assert gram_verdict([], structure_drift=0).level == "unknown"
    assert gram_verdict(looks(miou=[0.1, 0.2, 0.1, 0.05]), structure_drift=0.5).level == "unknown"


def test_a_dense_fall_with_a_rising_knn_needs_gram_anchoring_from_the_best_step() -> None:
    seen = looks(miou=[0.15, 0.3, 0.4, 0.42, 0.39, 0.37, 0.36], knn=RISING)
    verdict = gram_verdict(seen, structure_drift=0.2)
    assert verdict.level == "bad"
    assert verdict.reference == 300
    assert "Gram anchoring is needed; take the teacher of about step 300" in verdict.sentence
    assert "20% of the patch-similarity structure" in verdict.sentence
    assert "Raise its weight" in gram_verdict(seen, structure_drift=0.2, anchored=True).sentence


def test_the_same_fall_without_a_knn_probe_needs_it_too() -> None:
    seen = looks(miou=[0.15, 0.3, 0.4, 0.42, 0.39, 0.37, 0.36])
    assert "is needed" in gram_verdict(seen, structure_drift=0.2).sentence


def test_a_fall_of_everything_is_no_case_for_gram_anchoring() -> None:
    seen = looks(miou=[0.15, 0.3, 0.4, 0.42, 0.3, 0.2, 0.2], knn=[0.3, 0.4, 0.5, 0.6, 0.5, 0.4, 0.3])
    verdict = gram_verdict(seen, structure_drift=0.5)
    assert verdict.level == "bad"
    assert "not the remedy" in verdict.sentence


@pytest.mark.parametrize("last", [0.41, 0.405])
def test_a_wobble_is_no_fall(last: float) -> None:
    seen = looks(miou=[0.15, 0.3, 0.4, 0.42, 0.41, last, last], knn=RISING)
    assert gram_verdict(seen, structure_drift=0.3).level == "good"
    assert "holds" in gram_verdict(seen, structure_drift=0.3, anchored=True).sentence


def test_patches_at_their_best_now_need_nothing() -> None:
    verdict = gram_verdict(looks(miou=RISING, knn=RISING), structure_drift=0.0)
    assert verdict.level == "good"
    assert "at their best now (step 600)" in verdict.sentence


@pytest.mark.parametrize(("last", "level"), [(0.38, "watch"), (0.45, "good")])
def test_without_masks_a_fall_of_coherence_makes_a_suspicion(last: float, level: str) -> None:
    seen = looks(coherence=[0.6, 0.4, 0.5, 0.5, 0.45, last, last])
    verdict = gram_verdict(seen, structure_drift=0.3)
    assert verdict.level == level
    assert verdict.reference == 200, "the first tenth of a run is not taken for its best"
    assert "masks" in verdict.sentence


def test_looks_that_failed_do_not_count() -> None:
    seen = [*looks(miou=[0.2, 0.3]), LookRecord(step=900, stage="s", failed="no disk")]
    best = best_dense_look(seen)
    assert best is not None
    assert best.step == 100
    assert best_dense_look([seen[-1]]) is None


def test_collapse_is_called_so() -> None:
    fine = {"feature_std": [0.5, 0.9], "effective_rank": [10.0, 60.0], "effective_rank_limit": [192.0, 192.0]}
    assert health(looks(**fine)).level == "good"
    assert "collapse" in health(looks(**{**fine, "feature_std": [0.5, 0.02]})).sentence
    assert health(looks(**{**fine, "effective_rank": [30.0, 2.0]})).level == "bad"
    assert health([]).level == "unknown"


def test_a_network_that_never_spread_is_not_called_collapsed() -> None:
    def seen(count: int) -> list[LookRecord]:
        return looks(feature_std=[0.001] * count, effective_rank=[1.0] * count, effective_rank_limit=[192.0] * count)

    assert health(seen(1)).level == "unknown"
    assert health(seen(9)).level == "watch"
    assert "not spread yet" in health(seen(9)).sentence


def test_learning_is_told_by_probes() -> None:
    base = {"feature_std": [0.5, 0.9], "effective_rank": [10.0, 60.0], "effective_rank_limit": [192.0, 192.0]}
    assert health(looks(knn=[0.3, 0.7], **base)).sentence.startswith("It learns: k-NN from 0.300 to 0.700")
    assert health(looks(knn=[0.3, 0.2], **base)).level == "watch"
