import json
from types import SimpleNamespace

import pytest
import torch

from densedino.errors import InputError
from densedino.pretrain.settings import DataConfig, SourceConfig
from densedino.pretrain.signals import Stop
from densedino.pretrain.sitting import agree, first_process, pictures, until_stopped, write_config


def agreed(tmp_path, *, before, now, pictures=(3,), accept_changes=False):
    said = []
    snapshot = SimpleNamespace(config=before, notes={"pictures": list(pictures)})
    agree(tmp_path, snapshot, now, sources=["abc"], free=("workers",), accept_changes=accept_changes, say=said.append)
    return said


def test_the_same_run_goes_on_without_a_word(tmp_path):
    assert agreed(tmp_path, before={"lr": 1.0, "workers": 2}, now={"lr": 1.0, "workers": 0}) == []


def test_another_configuration_is_an_error_that_names_what_differs(tmp_path):
    with pytest.raises(InputError, match=r"lr.*1\.0.*2\.0[\s\S]*--accept-changes"):
        agreed(tmp_path, before={"lr": 1.0}, now={"lr": 2.0})
    (said,) = agreed(tmp_path, before={"lr": 1.0}, now={"lr": 2.0}, accept_changes=True)
    assert "lr" in said


def test_another_number_of_pictures_is_told(tmp_path):
    (said,) = agreed(tmp_path, before={}, now={}, pictures=(4,))
    assert "[3]" in said and "[4]" in said


def test_until_stopped_ends_with_the_batches_or_at_a_signal():
    class Batches(list):
        steps = range(3)

    stop = Stop()
    cpu = torch.device("cpu")
    assert list(until_stopped(Batches("abc"), stop, device=cpu)) == ["a", "b", "c"]
    taken = []
    for batch in until_stopped(Batches("abc"), stop, device=cpu):
        taken.append(batch)
        stop.asked = batch == "b"
    assert taken == ["a", "b"]


def test_pictures_are_named_by_the_configuration_or_by_their_kind():
    assert pictures(["abc"], DataConfig(sources=(SourceConfig(path="photos"),))) == [("photos", 3)]
    assert pictures(["abc"], DataConfig()) == [("str", 3)]


def test_the_configuration_is_written_whole(tmp_path):
    write_config(tmp_path, {"steps": 3})
    assert json.loads((tmp_path / "config.json").read_text()) == {"steps": 3}
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_the_first_process_calls_what_it_is_given_and_nothing_without():
    said = []
    first_process(said.append)("word")
    first_process(None)("word")
    assert said == ["word"]
