from __future__ import annotations

import json

import pytest

from densedino.pretrain.journal import Journal


def steps(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def write(path, *, start, until):
    journal = Journal(path, step=start)
    for step in range(start + 1, until + 1):
        journal.write({"step": step, "losses": {"total": 1.0}})
    journal.sync()
    journal.close()


@pytest.mark.parametrize("tail", ["", '{"step": 8, "los', '{"step": 8}', "\n\n", "not JSON\n"])
def test_lines_after_the_snapshot_are_rewound_and_nothing_doubles(tmp_path, tail):
    path = tmp_path / "run" / "metrics.jsonl"
    write(path, start=0, until=7)
    with path.open("a") as file:
        file.write(tail)
    write(path, start=5, until=9)
    assert steps(path) == list(range(1, 10))
    write(path, start=9, until=10)
    assert steps(path) == list(range(1, 11))
    write(path, start=0, until=2)
    assert steps(path) == [1, 2]


def test_numbers_that_json_has_not_become_null(tmp_path):
    journal = Journal(tmp_path / "metrics.jsonl", step=0)
    journal.write({"step": 1, "losses": {"total": float("nan")}, "ids": ("a", float("inf"))})
    journal.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {
        "step": 1,
        "losses": {"total": None},
        "ids": ["a", None],
    }
