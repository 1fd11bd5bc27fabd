"""`densedino select` as a user runs it; the list it writes is what `extract` takes."""

from __future__ import annotations

import shutil

import pytest

from densedino.cli.main import main


@pytest.fixture
def folder(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(photos, "photos")
    shutil.copy("photos/coffee.jpg", "photos/coffee_again.jpg")
    assert main(["extract", "photos", "-o", "f", "--resize", "96"]) == 0


def test_copies_are_found_and_left_out_of_the_list(folder, capsys):
    capsys.readouterr()
    assert main(["select", "f", "--duplicates", "-o", "kept.txt"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[:3] == ["group:", "  photos/coffee.jpg", "  photos/coffee_again.jpg"]
    assert "1 groups; 1 of 5 images" in out
    assert main(["extract", "kept.txt", "-o", "g", "--resize", "96"]) == 0
    assert "4 images done" in capsys.readouterr().out


@pytest.mark.parametrize("by", ["k-center", "cluster"])
def test_a_few_that_differ(folder, capsys, by):
    capsys.readouterr()
    assert main(["select", "f", "--diverse", "4", "--by", by]) == 0
    chosen = capsys.readouterr().out.split()
    assert len(set(chosen)) == 4
    if by == "k-center":
        assert len({"photos/coffee.jpg", "photos/coffee_again.jpg"} & set(chosen)) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--duplicates, or --diverse"),
        (["--duplicates", "--diverse", "3"], "one of them"),
        (["--diverse", "9"], "of 5"),
        (["--duplicates", "-o", "x.csv"], ".txt"),
    ],
)
def test_what_cannot_be_selected_is_refused(folder, arguments, message, capsys):
    assert main(["select", "f", *arguments]) == 2
    assert message in capsys.readouterr().err
