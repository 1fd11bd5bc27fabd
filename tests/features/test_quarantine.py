"""The report of failed inputs: survives a torn line, forgets on demand."""

from __future__ import annotations

from densedino.features.quarantine import Entry, Quarantine


def entry(key, *, size=1, mtime_ns=2):
    return Entry(key=key, path=f"/{key}", reason="why", size=size, mtime_ns=mtime_ns)


def test_entries_are_there_again(tmp_path):
    path = tmp_path / "quarantine.jsonl"
    Quarantine(path).add([entry("a"), entry("ü\udcff")])
    Quarantine(path).add([entry("b", size=None, mtime_ns=None)])
    again = Quarantine(path)
    assert list(again.entries) == ["a", "ü\udcff", "b"]
    assert again.holds("a", (1, 2))
    assert not again.holds("a", (1, 3))
    assert not again.holds("a", None)
    assert again.holds("b", None)
    assert not again.holds("c", None)


def test_a_torn_line_costs_one_entry(tmp_path):
    path = tmp_path / "quarantine.jsonl"
    Quarantine(path).add([entry("a"), entry("b")])
    path.write_bytes(path.read_bytes()[:-20])
    torn = Quarantine(path)
    assert list(torn.entries) == ["a"]
    torn.add([entry("b")])
    assert list(Quarantine(path).entries) == ["a", "b"]


def test_forget(tmp_path):
    path = tmp_path / "quarantine.jsonl"
    quarantine = Quarantine(path)
    quarantine.forget(["a"])
    quarantine.add([])
    assert not path.exists()
    quarantine.add([entry("a"), entry("b")])
    quarantine.forget(["a", "c"])
    assert list(quarantine.entries) == list(Quarantine(path).entries) == ["b"]
