from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from densedino.engines.artefacts import artefact, model_digest, model_state

MAKER = """
import os, sys, time
os.environ["DENSEDINO_CACHE"] = sys.argv[1]
from densedino.engines.artefacts import artefact
def make(folder):
    (folder / "one").write_text("half")
    print("begun", flush=True)
    time.sleep(float(sys.argv[2]))
    (folder / "two").write_text("whole")
print(artefact({"what": "test"}, make), flush=True)
"""


def test_the_same_key_is_made_once() -> None:
    calls = []

    def make(folder: Path) -> None:
        calls.append(folder)
        (folder / "graph").write_text("x")

    first = artefact({"model": "a"}, make)
    assert artefact({"model": "a"}, make) == first
    assert artefact({"model": "b"}, make) != first
    assert len(calls) == 2
    assert (first / "graph").read_text() == "x"
    assert '"model": "a"' in (first / "key.json").read_text()


def test_a_failure_leaves_nothing() -> None:
    def fail(folder: Path) -> None:
        (folder / "graph").write_text("half")
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        artefact({"model": "a"}, fail)
    assert not (artefact({"model": "a"}, lambda folder: None) / "graph").exists()


def start(cache, seconds):
    return subprocess.Popen([sys.executable, "-c", MAKER, str(cache), str(seconds)], stdout=subprocess.PIPE, text=True)


def test_a_killed_maker_leaves_nothing_that_is_taken_for_whole(tmp_path) -> None:
    killed = start(tmp_path, 60)
    assert killed.stdout.readline() == "begun\n"
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    out, _ = start(tmp_path, 0).communicate(timeout=500)
    folder = Path(out.splitlines()[-1])
    assert sorted(p.name for p in folder.iterdir()) == ["key.json", "one", "two"]
    assert not list(folder.parent.glob("*.tmp")), "the next one tidies up"


def test_two_processes_make_one(tmp_path) -> None:
    first = start(tmp_path, 3)
    assert first.stdout.readline() == "begun\n"
    second = start(tmp_path, 0)
    out, _ = second.communicate(timeout=500)
    assert "begun" not in out
    assert first.communicate(timeout=500)[0].strip() == out.strip()


def test_state_and_digest_follow_the_weights(lively) -> None:
    model = lively("debug_vit")
    state, digest = model_state(model), model_digest(model)
    assert (model_state(model), model_digest(model)) == (state, digest)
    with torch.no_grad():
        model.blocks[0].ls1.gamma.mul_(2.0)
    assert model_state(model) != state
    assert model_digest(model) != digest
