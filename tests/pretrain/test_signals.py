from __future__ import annotations

import os
import signal
import threading

import pytest

from densedino.pretrain.signals import stop_on_signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_does_what_it_always_did(number):
    got = []
    before = signal.signal(number, lambda *_: got.append(number))
    try:
        with stop_on_signals() as stop:
            assert not stop.asked
            os.kill(os.getpid(), number)
            assert stop.asked
            assert got == []
            os.kill(os.getpid(), number)
            assert got == [number]
        os.kill(os.getpid(), number)
        assert got == [number, number]
    finally:
        signal.signal(number, before)


def test_another_thread_has_no_signals():
    found = []

    def work():
        with stop_on_signals() as stop:
            found.append(stop.asked)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False]
