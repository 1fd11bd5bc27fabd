"""The real command over a folder of hostile files: it ends well, reports every bad file, and stores every good one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import densedino as dd

MAKE = Path(__file__).parents[1] / "images" / "make_corpus.py"
COMMAND = [sys.executable, "-m", "densedino", "extract", "images", "-o", "store", "--device", "cpu"]
OPTIONS = ["--model", "debug_vit", "--weights", "random", "--max-tokens", "2048"]


LIMITED = ["sh", "-c", 'ulimit -v 8388608; exec "$@"', "sh"]  # KiB; torch alone maps about 2 GiB


def run(folder: Path) -> subprocess.CompletedProcess[str]:
    command = LIMITED + COMMAND + OPTIONS
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=400, check=False)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    subprocess.run([sys.executable, MAKE, folder], check=True, capture_output=True)
    return folder


def test_extraction_survives_a_folder_of_hostile_files(corpus):
    manifest = json.loads((corpus / "manifest.json").read_text())
    first = run(corpus)
    assert first.returncode == 0, first.stderr[-3000:]
    assert "Traceback" not in first.stderr
    assert "Warning" not in first.stderr

    store = dd.FeatureStore(corpus / "store")
    stored = set(store.keys())
    entries = [json.loads(line) for line in (corpus / "store/quarantine.jsonl").read_text().splitlines()]
    quarantined = {entry["key"] for entry in entries}
    assert len(stored) == len(store)
    assert len(quarantined) == len(entries)
    assert not stored & quarantined
    assert all(entry["reason"] for entry in entries)

    def key(name: str) -> str:
        return f"images/{name}".encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")

    hidden = {name for name in manifest if Path(name).name.startswith(".")}
    assert stored | quarantined == {key(name) for name in manifest if name not in hidden}
    good = {key(name) for name, must in manifest.items() if must["must"] == "equal" and name not in hidden}
    bad = {key(name) for name, must in manifest.items() if must["must"] == "refuse" or "transform" in must}
    assert good <= stored
    assert bad <= quarantined
    for features in store:
        assert bool(features.patches.isfinite().all())

    again = run(corpus)
    assert again.returncode == 0, again.stderr[-3000:]
    assert set(dd.FeatureStore(corpus / "store").keys()) == stored
    assert len((corpus / "store/quarantine.jsonl").read_text().splitlines()) == len(entries)
    assert "to do      0 of" in again.stderr
