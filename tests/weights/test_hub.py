from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from safetensors.torch import save

from densedino.errors import InputError, MissingExtraError
from densedino.weights.dialects import from_meta
from densedino.weights.hub import cached_snapshot, fetch_snapshot, hub_id

COMMIT = "a" * 40


@pytest.mark.parametrize(
    ("text", "repository"),
    [
        ("facebook/dinov3-vits16-pretrain-lvd1689m", "facebook/dinov3-vits16-pretrain-lvd1689m"),
        ("timm/convnext_tiny.dinov3_lvd1689m", "timm/convnext_tiny.dinov3_lvd1689m"),
        ("hf:me/model@v1.0", "me/model@v1.0"),
        ("hf-hub:timm/vit_small_patch16_dinov3.lvd1689m", "timm/vit_small_patch16_dinov3.lvd1689m"),
        ("weights/vits16.pth", None),
        ("facebook/deep/path", None),
        ("/facebook/model", None),
        ("vits16.pth", None),
        ("C:/weights/vits16.pth", None),
        ("me/model", None),
    ],
)
def test_ids_are_told_from_paths(text, repository):
    assert hub_id(text) == repository


@pytest.mark.parametrize("text", ["hf:", "hf:model", "hf:a/b/c", "hf-hub:../../etc", "hf:a b/c"])
def test_a_prefix_before_no_id_is_an_error(text):
    with pytest.raises(InputError, match="hf:owner/name"):
        hub_id(text)


def test_nothing_is_cached_at_first():
    assert cached_snapshot("facebook/dinov3-vits16-pretrain-lvd1689m") is None
    assert cached_snapshot(None) is None


def test_without_its_client_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", None)
    with pytest.raises(MissingExtraError, match=r"densedino\[interop\]"):
        fetch_snapshot("timm/x")


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as its client asks for; `server.files` are served, `server.refusal` is what files answer."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        files, refusal = self.server.files, self.server.refusal
        name = self.path.rpartition("/")[2]
        if self.path.startswith("/api/models/") and "/tree/" in self.path:
            rows = [{"type": "file", "path": n, "size": len(c), "oid": "b" * 40} for n, c in files.items()]
            self.answer(200, json.dumps(rows).encode())
        elif self.path.startswith("/api/models/"):
            siblings = [{"rfilename": name} for name in files]
            self.answer(200, json.dumps({"id": "x/y", "modelId": "x/y", "sha": COMMIT, "siblings": siblings}).encode())
        elif name in files and refusal:
            self.answer(403, b"", {"X-Error-Code": refusal, "X-Error-Message": "no"})
        elif name in files:
            self.answer(200, files[name], {"ETag": f'"{hashlib.sha256(files[name]).hexdigest()}"'})
        else:
            self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})

    def answer(self, status, body, headers=None):
        self.send_response(status)
        for key, value in {"X-Repo-Commit": COMMIT, "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture
def local_hub(tmp_path, released):
    """Run code in a process whose hub is a server here; its client reads the address when it is imported."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.daemon_threads = True
    server.files = {"model.safetensors": save(from_meta(released("debug_vit"), "huggingface")), "config.json": b"{}"}
    server.refusal = ""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()

    def run(code):
        env = os.environ | {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "OMP_NUM_THREADS": "1",
        }
        program = f"from densedino.weights.hub import *\n{code}"
        done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=False)
        return done.stdout + done.stderr

    run.server = server
    yield run
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_repository_is_fetched_and_then_found_without_network(local_hub):
    out = local_hub("from densedino.weights.loading import *; print(load_weights(weights='hf:me/model')[1])")
    assert "source='hf:me/model'" in out and "dialect='huggingface'" in out and "name='debug_vit'" in out
    local_hub.server.files = {}
    out = local_hub("print(cached_snapshot('me/model'), cached_snapshot('me/other'))")
    assert f"snapshots/{COMMIT} None" in out


@pytest.mark.parametrize(
    ("refusal", "words"),
    [
        ("GatedRepo", "is a gated repository. Accept its licence on"),
        ("RepoNotFound", "is not on the hub, or is private"),
    ],
)
def test_refusals_have_their_messages(local_hub, refusal, words):
    local_hub.server.refusal = refusal
    assert words in local_hub("fetch_snapshot('facebook/dinov3-vits16-pretrain-lvd1689m')")


def test_no_network_has_its_message(local_hub):
    local_hub.server.files = {}
    local_hub.server.socket.close()
    assert "the hub cannot be reached, and its cache here has no copy" in local_hub("fetch_snapshot('timm/x')")
