"""Connections that stall, addresses that are taken, and the end."""

import socket
import threading
import time

import pytest

from densedino.errors import InputError
from densedino.serve.running import listen
from densedino.serve.settings import Settings


def test_an_address_that_is_taken_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"127.0.0.1:{port}.*--port"):
            listen(Settings(port=port))


@pytest.mark.parametrize(
    "data", [b"", b"GET /healthz HTTP/1.1\r\nHost: lo", b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\nGET"]
)
def test_a_head_that_does_not_come_closes_the_connection(server, data):
    start = time.monotonic()
    server.raw(data)
    assert 0.5 < time.monotonic() - start < 6


def test_trickling_does_not_help(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as sock:
        start = time.monotonic()
        with pytest.raises(OSError):
            while time.monotonic() - start < 8:
                sock.sendall(b"G")
                time.sleep(0.1)
        assert time.monotonic() - start < 6


def test_what_was_let_in_is_answered_after_the_order_to_stop(tiny, serve_with, png, monkeypatch):
    slow = tiny.run

    def run(prepared, *, layers=(), norm="post"):
        time.sleep(0.3)
        return slow(prepared, layers=layers, norm=norm)

    monkeypatch.setattr(tiny, "run", run)
    answers = []
    with serve_with(tiny, Settings(port=0, decoders=1, max_batch=1)) as server:
        threads = [
            threading.Thread(
                target=lambda i=i: answers.append(server.ask("POST", "/v1/features", body=png(32, 32, seed=i)))
            )
            for i in range(4)
        ]
        for thread in threads:
            thread.start()
        time.sleep(0.3)
    for thread in threads:
        thread.join(20)
    assert [answer.status for answer in answers] == [200] * 4
