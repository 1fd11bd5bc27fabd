"""`densedino serve` as a user starts and stops it: a process, a signal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import urllib.request

import pytest

from densedino.cli.main import main


def test_the_server_says_where_it_is_answers_and_ends_well(tmp_path):
    command = [sys.executable, "-m", "densedino", "serve", "--port", "0", "--no-browser", "--decoders", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, "--model", "debug_vit", "--weights", "random"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env=environment,
    )
    try:
        address = process.stdout.readline().strip()
        assert address.startswith("http://127.0.0.1:")
        with urllib.request.urlopen(f"{address}readyz", timeout=60) as answer:
            assert answer.status == 200
        process.send_signal(signal.SIGTERM)
        out, errors = process.communicate(timeout=120)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, errors
    assert "UNTRAINED" in errors and "answered" in errors and '"path": "/readyz"' in errors and not out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--host", "0.0.0.0"], "DENSEDINO_TOKEN"),
        (["nowhere"], "nowhere"),
        (["--max-wait", "0"], "max_wait"),
        (["--origin", "*"], "origin"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_loaded(arguments, word, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DENSEDINO_TOKEN", raising=False)
    assert main(["serve", *arguments]) == 2
    assert word in capsys.readouterr().err
