"""A running server with a tiny model and a small collection, and ways to speak to it that no library would allow."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import socket
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import densedino as dd
from densedino.serve.collection import open_collection
from densedino.serve.running import listen, serve
from densedino.serve.settings import Settings


def image_bytes(height=48, width=64, *, form="PNG", seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((width, height)).save(file, form)
    return file.getvalue()


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Server:
    service: Any
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(self, method, path, *, body=None, headers=None) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            return Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
        finally:
            connection.close()

    def raw(self, data: bytes, *, seconds: float = 10.0) -> bytes:
        """Send bytes as they are, and read until the server closes."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=seconds) as sock:
            sock.sendall(data)
            received = b""
            with contextlib.suppress(ConnectionResetError):
                while part := sock.recv(65536):
                    received += part
            return received


@contextlib.contextmanager
def running(dino, settings, *, collection=None, scene=None):
    up, stops, failed = threading.Event(), [], []

    def started(service, stop):
        stops.extend([service, stop])
        up.set()

    def run():
        try:
            serve(dino, sock, settings, collection=collection, scene=scene, started=started)
        except BaseException as error:
            failed.append(error)
        finally:
            up.set()

    with listen(settings) as sock:
        thread = threading.Thread(target=run)
        thread.start()
        assert up.wait(60)
        try:
            if not failed:
                yield Server(stops[0], sock.getsockname()[1])
        finally:
            if stops:
                stops[1]()
            thread.join(60)
    assert not failed, failed


@pytest.fixture(scope="session")
def tiny():
    dino = dd.load("debug_vit", weights="random")
    for block in dino.model.blocks:
        torch.nn.init.constant_(block.ls1.gamma, 0.5)
    return dino


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("collection")
    for number in range(3):
        (path / f"{number}.png").write_bytes(image_bytes(64, 64 + 16 * number, seed=number))
    return path


@pytest.fixture(scope="session")
def server(tiny, folder):
    """Limits are small, so that tests reach them."""
    settings = Settings(
        port=0,
        decoders=1,
        max_bytes=200_000,
        max_pixels=1_000_000,
        max_tokens=256,
        header_seconds=1.0,
        upload_seconds=1.0,
    )
    with running(tiny, settings, collection=open_collection([str(folder)])) as server:
        yield server


@pytest.fixture(scope="session")
def png():
    """A function that gives the bytes of a picture of that height and width."""
    return image_bytes


@pytest.fixture(scope="session")
def serve_with():
    """A context manager that runs a server of its own."""
    return running
