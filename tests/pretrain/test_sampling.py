from __future__ import annotations

import itertools
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from densedino.errors import InputError
from densedino.pretrain.sampling import Permutation, Sampler, choose


def order(sampler: Sampler, steps: range) -> list[tuple[int, int]]:
    return [next(sampler.candidates(step, place)) for step in steps for place in range(sampler.batch_size)]


@given(length=st.integers(1, 3000), key=st.integers(0, 2**63 - 1))
@settings(max_examples=30, deadline=None)
def test_a_permutation_has_every_number_once(length: int, key: int) -> None:
    permutation = Permutation(length, key=key)
    assert sorted(permutation[i] for i in range(length)) == list(range(length))
    with pytest.raises(IndexError):
        permutation[length]


@pytest.mark.parametrize("length", [3, 4])
def test_small_permutations_are_equally_likely(length: int) -> None:
    draws = 3000
    found = Counter(tuple(Permutation(length, key=k)[i] for i in range(length)) for k in range(draws))
    expected = draws / len(list(itertools.permutations(range(length))))
    chi_square = sum((found[p] - expected) ** 2 / expected for p in itertools.permutations(range(length)))
    assert chi_square < {3: 20.5, 4: 49.7}[length]  # 99.9th percentile of 5 and 23 degrees of freedom


def test_neighbours_are_far_apart() -> None:
    length = 5000
    values = np.array([Permutation(length, key=1)[i] for i in range(length)])
    assert abs(np.corrcoef(values, np.arange(length))[0, 1]) < 0.05
    assert abs(np.corrcoef(values[1:], values[:-1])[0, 1]) < 0.05


@given(length=st.integers(1, 200), batch_size=st.integers(1, 40), seed=st.integers(0, 2**31), homogeneous=st.booleans())
@settings(max_examples=40, deadline=None)
def test_an_epoch_has_every_picture_once(length: int, batch_size: int, seed: int, homogeneous: bool) -> None:
    sampler = Sampler(lengths=(length,), batch_size=batch_size, seed=seed, homogeneous=homogeneous)
    steps = -(-3 * length // batch_size)
    stream = [index for _, index in order(sampler, range(steps))]
    epochs = [stream[i * length : (i + 1) * length] for i in range(3)]
    assert all(sorted(epoch) == list(range(length)) for epoch in epochs)
    if length > 20:
        assert epochs[0] != epochs[1]


@given(
    lengths=st.lists(st.integers(1, 300), min_size=2, max_size=4),
    batch_size=st.integers(1, 16),
    homogeneous=st.booleans(),
    start=st.integers(0, 3000),
)
@settings(max_examples=30, deadline=None)
def test_each_source_is_a_stream_of_epochs(lengths: list[int], batch_size: int, homogeneous: bool, start: int) -> None:
    """What comes of a source from any step on is a window of its epochs, without gaps or repetitions."""
    sampler = Sampler(lengths=tuple(lengths), batch_size=batch_size, seed=3, homogeneous=homogeneous)
    whole = order(sampler, range(start + 40))
    for source, length in enumerate(lengths):
        stream = [index for s, index in whole if s == source]
        for first in range(0, len(stream) - length, length):
            assert len(set(stream[first : first + length])) == length
    assert whole[start * batch_size :] == order(sampler, range(start, start + 40))


def test_weights_are_kept_exactly() -> None:
    sampler = Sampler(lengths=(1000, 10, 500), weights=(0.5, 0.1, 0.4), batch_size=8, seed=0)
    assert sampler.quotas == (5000, 1000, 4000)
    counts = Counter(source for source, _ in order(sampler, range(1250)))  # 10,000 choices
    assert counts == {0: 5000, 1: 1000, 2: 4000}
    halves = Counter(source for source, _ in order(sampler, range(125)))
    assert halves[0] / 1000 == pytest.approx(0.5, abs=0.05), "mixed well inside, too"


def test_homogeneous_steps_come_from_one_source() -> None:
    sampler = Sampler(lengths=(90, 10), weights=(1, 1), batch_size=8, seed=0, homogeneous=True)
    sources = [{next(sampler.candidates(step, place))[0] for place in range(8)} for step in range(200)]
    assert all(len(found) == 1 for found in sources)
    assert 60 < sum(found == {0} for found in sources) < 140


def test_without_weights_every_picture_is_as_likely() -> None:
    sampler = Sampler(lengths=(9000, 1000), batch_size=4, seed=0)
    assert sampler.quotas == (9000, 1000)


def test_the_least_source_gets_a_turn() -> None:
    quotas = Sampler(lengths=(10**9, 1, 1), batch_size=4, seed=0).quotas
    assert sum(quotas) == 10_000 and quotas[1:] == (1, 1)


def test_step_a_million_is_there_at_once() -> None:
    sampler = Sampler(lengths=(10**9, 10**6), batch_size=4096, seed=0)
    start = time.perf_counter()
    first = [next(sampler.candidates(10**6, place)) for place in range(64)]
    assert time.perf_counter() - start < 1
    assert len(set(first)) == 64


def test_replacements_are_of_nobody_else_in_the_epoch() -> None:
    sampler = Sampler(lengths=(101,), batch_size=8, seed=0)
    for step in (0, 5, 11):  # places 8·step … 8·step + 7 lie in the first epoch
        reach = [[index for _, index in itertools.islice(sampler.candidates(step, place), 12)] for place in range(8)]
        everything = list(itertools.chain(*reach))
        assert len(everything) == len(set(everything)) == 96
    with_source = Sampler(lengths=(50, 60), batch_size=8, seed=0, homogeneous=True)
    assert len({source for source, _ in itertools.islice(with_source.candidates(3, 0), 100)}) == 1


def test_seeds_and_epochs_differ() -> None:
    one, two = (order(Sampler(lengths=(50,), batch_size=10, seed=s), range(5)) for s in (0, 1))
    assert one != two and sorted(one) == sorted(two)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lengths": ()}, "each needs one or more"),
        ({"lengths": (3, 0)}, "each needs one or more"),
        ({"batch_size": 0}, "1 or more"),
        ({"weights": (1.0, 2.0)}, "give each one a number above 0"),
        ({"weights": (float("nan"),)}, "give each one a number above 0"),
        ({"lengths": (1,) * 10_001}, "Put them in one text list"),
    ],
)
def test_what_cannot_be_sampled_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Sampler(**({"lengths": (3,), "batch_size": 1, "seed": 0} | arguments))  # type: ignore[arg-type]


def test_shares_are_chosen_as_often_as_they_are_large() -> None:
    chosen = Counter(choose((0.3, 0.6, 0.1), purpose="resolution", seed=5, step=step) for step in range(3000))
    assert [chosen[i] / 3000 for i in range(3)] == pytest.approx([0.3, 0.6, 0.1], abs=0.03)
    assert {choose((2.0,), purpose="resolution", seed=0, step=step) for step in range(20)} == {0}
