"""Owns what the tests of weights share: an empty cache, checkpoints like Meta's, a web server that misbehaves."""

from __future__ import annotations

import re
import threading
import time
from collections import deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from densedino.models.catalog import create_model
from densedino.weights import transfer


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The cache folder, empty, and no waiting between attempts."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("DENSEDINO_CACHE", str(folder))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(transfer, "BACKOFF", 0.001)
    return folder


@pytest.fixture
def released():
    """A function that makes a state dict like those that Meta releases: every tensor distinct, all quirks included."""

    def make(name, *, seed=0, in_chans=3, dtype=torch.float32, key_bias=False, zero_bias=False, sat=False):
        generator = torch.Generator().manual_seed(seed)
        state = create_model(name, in_chans=in_chans).state_dict()
        for key, value in state.items():
            if key.endswith((".bias_mask", ".periods")):
                continue
            noise = torch.randn(value.shape, generator=generator)
            if key.endswith("gamma"):
                state[key] = 0.2 + 0.05 * noise
            elif key.endswith("weight") and value.ndim == 1:
                state[key] = 1.0 + 0.1 * noise
            else:
                state[key] = noise * (0.1 if value.ndim == 1 or "token" in key else value[0].numel() ** -0.5)
            if key.endswith("qkv.bias"):
                if zero_bias:
                    state[key].zero_()
                elif not key_bias:
                    state[key].chunk(3)[1].zero_()
        if "rope_embed.periods" in state:
            state["rope_embed.periods"] = state["rope_embed.periods"].bfloat16().float()
        elif "stages.0.0.gamma" in state:
            state |= {f"norms.3.{kind}": state[f"norm.{kind}"].clone() for kind in ("weight", "bias")}
        if sat:
            width = state["cls_token"].shape[-1]
            state |= {f"local_cls_norm.{kind}": torch.randn(width, generator=generator) for kind in ("weight", "bias")}
        return {key: value.to(dtype) for key, value in state.items()}

    return make


class Site:
    """What the server serves, how it fails, and what it was asked.

    `script` holds the behaviour of the next requests, one each; after it, the server behaves. Behaviours: ("drop", n)
    sends n bytes of the body and breaks the connection; ("status", code, body, type) answers that; "ignore-range"
    sends all of it with 200; "shifted" answers a range with another one; "hang" sends nothing for long.
    """

    def __init__(self):
        self.content = bytes(range(256)) * 4096
        self.etag = '"one"'
        self.modified = ""
        self.script = deque()
        self.requests = []
        self.redirect = ""
        self.chunked = False


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        site = self.server.site
        site.requests.append((self.path, dict(self.headers)))
        behaviour = site.script.popleft() if site.script else None
        if site.redirect:
            self._answer(302, b"", {"Location": site.redirect})
        elif behaviour == "hang":
            time.sleep(1.5)
            self.close_connection = True
        elif isinstance(behaviour, tuple) and behaviour[0] == "status":
            self._answer(
                behaviour[1], behaviour[2], {"Content-Type": behaviour[3] if len(behaviour) > 3 else "text/html"}
            )
        else:
            self._serve(site, behaviour)

    def _serve(self, site, behaviour):
        validators = {"ETag": site.etag} if site.etag else {}
        validators |= {"Last-Modified": site.modified} if site.modified else {}
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        fresh = self.headers.get("If-Range", site.etag) in (site.etag, site.modified) or behaviour == "blind"
        if site.etag and self.headers.get("If-None-Match") == site.etag:
            return self._answer(304, b"", validators)
        start, total = (int(asked[1]) if asked and fresh and behaviour != "ignore-range" else 0), len(site.content)
        if start and start >= total:
            return self._answer(416, b"", {"Content-Range": f"bytes */{total}"})
        status, headers = 200, dict(validators)
        if start:
            said = start + 7 if behaviour == "shifted" else start
            status, headers["Content-Range"] = 206, f"bytes {said}-{total - 1}/{total}"
        limit = behaviour[1] if isinstance(behaviour, tuple) else None
        return self._answer(status, site.content[start:], headers, limit=limit, chunked=site.chunked)

    def _answer(self, status, body, headers, *, limit=None, chunked=False):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if chunked:
            self.send_header("Transfer-Encoding", "chunked")
            body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
        else:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body if limit is None else body[:limit])
        self.close_connection = True


@pytest.fixture
def site():
    """A web server on this machine; `site.url` is its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    server.site = Site()
    server.site.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server.site
    server.shutdown()
    server.server_close()
    thread.join()
