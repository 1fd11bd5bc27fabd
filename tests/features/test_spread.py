"""Shares are parts without overlap; what is missing for several processes is said."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from densedino.errors import InputError
from densedino.features.spread import RayRunner, Share, the_share


@given(count=st.integers(0, 1000), world=st.integers(1, 40))
def test_shares_are_nearly_equal_parts_of_all(count, world):
    parts = [Share(rank, world).of(count) for rank in range(world)]
    assert [number for part in parts for number in part] == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_one_process_has_all_and_waits_for_nobody(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with the_share() as share:
        share.wait()
        assert share == Share(0, 1)


def test_half_an_environment_of_torchrun_is_an_error(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError, match="torchrun"), the_share():
        pass


class FakeRay:
    """A Ray that begins at the third try."""

    def __init__(self, failures):
        self.failures, self.tried = failures, 0

    def init(self, **options):
        assert options["include_dashboard"] is False
        self.tried += 1
        if self.tried <= self.failures:
            raise Exception("timed out during startup")

    def shutdown(self):
        pass


def test_a_ray_of_our_own_is_started_again_and_that_of_others_is_not():
    slow = FakeRay(2)
    RayRunner()._connect(slow)
    assert slow.tried == 3
    with pytest.raises(InputError, match=r"on this machine.*timed out.*ray start --head"):
        RayRunner()._connect(FakeRay(3))
    away = FakeRay(1)
    with pytest.raises(InputError, match="at 'auto'"):
        RayRunner(address="auto")._connect(away)
    assert away.tried == 1
