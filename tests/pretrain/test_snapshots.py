from __future__ import annotations

import json
import os

import pytest
import torch
from torch import nn

from densedino.errors import InputError, StateDictError
from densedino.pretrain.snapshots import (
    Position,
    config_differences,
    find_snapshot,
    prune_snapshots,
    read_snapshot,
    training_tensors,
    write_snapshot,
)

CONFIG = {"seed": 0}


def make(seed, *, trained=True, width=5):
    torch.manual_seed(seed)
    model = nn.ModuleDict({"student": nn.Linear(3, width), "teacher": nn.Linear(3, width).requires_grad_(False)})
    optimizer = torch.optim.AdamW(model["student"].parameters(), lr=0.1, fused=True)
    if trained:
        for _ in range(3):
            model["student"](torch.randn(2, 3)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    return model, optimizer


def write(folder, seed, total):
    state = training_tensors(*make(seed))
    return write_snapshot(folder, state, position=Position(stage=0, step=total, total=total), config=CONFIG)


def said():
    lines = []
    return lines, lines.append


def test_all_comes_back_bit_for_bit_and_training_goes_on_the_same(tmp_path):
    model, optimizer = make(0)
    state = training_tensors(model, optimizer)
    assert {"model.student.weight", "model.teacher.bias", "optimizer.student.weight.exp_avg"} <= state.keys()
    assert "optimizer.teacher.weight.exp_avg" not in state
    position = Position(stage=1, step=3, total=10)
    path = write_snapshot(tmp_path, state, position=position, config=CONFIG, notes={"skipped": [4]})
    assert sorted(p.name for p in path.iterdir()) == ["model.safetensors", "optimizer.safetensors", "snapshot.json"]
    lines, announce = said()
    found = find_snapshot(tmp_path, announce=announce)
    assert (found.path, found.position, found.config, found.notes) == (path, position, CONFIG, {"skipped": [4]})
    other, its_optimizer = make(1, trained=False)
    read_snapshot(found, training_tensors(other, its_optimizer))
    for m, o in ((model, optimizer), (other, its_optimizer)):
        m["student"](torch.ones(2, 3)).sum().backward()
        o.step()
    for name, value in training_tensors(model, optimizer).items():
        assert torch.equal(value, training_tensors(other, its_optimizer)[name]), name
    assert lines == []


def test_moments_that_are_not_there_yet_are_those_adamw_begins_with():
    (model, optimizer), (other, its_optimizer) = make(0, trained=False), make(0, trained=False)
    training_tensors(model, optimizer)
    for m, o in ((model, optimizer), (other, its_optimizer)):
        m["student"](torch.ones(2, 3)).sum().backward()
        o.step()
    assert torch.equal(model["student"].weight, other["student"].weight)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "no description", "half a description"])
def test_a_damaged_snapshot_is_set_aside_and_the_one_before_taken(tmp_path, damage):
    whole, newest = write(tmp_path, 0, 10), write(tmp_path, 1, 20)
    file = newest / "model.safetensors"
    if damage == "truncated":
        os.truncate(file, 100)
    elif damage == "flipped":
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    elif damage == "missing":
        file.unlink()
    elif damage == "no description":
        (newest / "snapshot.json").unlink()
    else:
        os.truncate(newest / "snapshot.json", 20)
    lines, announce = said()
    assert find_snapshot(tmp_path, announce=announce).path == whole
    assert len(lines) == 1
    assert "step-00000020 is damaged" in lines[0]
    assert (tmp_path / "damaged-step-00000020").is_dir()
    assert find_snapshot(tmp_path, announce=announce).path == whole
    assert len(lines) == 1


def test_no_snapshot_and_leftovers(tmp_path):
    (tmp_path / ".step-00000010.abc.tmp").mkdir()
    (tmp_path / ".step-00000010.abc.tmp" / "model.safetensors").write_bytes(b"half")
    assert find_snapshot(tmp_path, announce=pytest.fail) is None
    assert list(tmp_path.iterdir()) == []
    assert find_snapshot(tmp_path / "not there", announce=pytest.fail) is None


def test_a_snapshot_of_the_same_step_is_replaced(tmp_path):
    write(tmp_path, 0, 10)
    write(tmp_path, 1, 10)
    model, optimizer = make(2, trained=False)
    read_snapshot(find_snapshot(tmp_path, announce=pytest.fail), training_tensors(model, optimizer))
    assert torch.equal(model["student"].weight, make(1)[0]["student"].weight)


def test_a_crash_while_writing_leaves_no_snapshot(tmp_path, monkeypatch):
    def crash(*_):
        raise OSError("disk full")

    monkeypatch.setattr("densedino.pretrain.snapshots.save_file", crash)
    with pytest.raises(OSError, match="disk full"):
        write(tmp_path, 0, 10)
    assert list(tmp_path.iterdir()) == []


def test_the_last_ones_and_every_so_many_steps_are_kept(tmp_path):
    for total in range(10, 80, 10):
        (tmp_path / f"step-{total:08d}").mkdir(parents=True)
    prune_snapshots(tmp_path, keep_last=2, keep_every=30)
    assert sorted(int(p.name[5:]) for p in tmp_path.iterdir()) == [30, 60, 70]
    prune_snapshots(tmp_path, keep_last=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000070"]


def test_a_snapshot_of_another_model_is_refused(tmp_path):
    write(tmp_path, 0, 10)
    snapshot = find_snapshot(tmp_path, announce=pytest.fail)
    model, optimizer = make(0, width=6)
    with pytest.raises(StateDictError, match=r"student\.bias has shape \(5,\), and the model's has \(6,\)"):
        read_snapshot(snapshot, dict(sorted(training_tensors(model, optimizer).items())))
    tensors = training_tensors(*make(0))
    tensors["model.more"] = tensors.pop("model.student.bias")
    with pytest.raises(StateDictError, match=r"lacks model\.more and has model\.student\.bias"):
        read_snapshot(snapshot, tensors)


def test_a_snapshot_of_another_densedino_is_refused_and_left_alone(tmp_path):
    path = write(tmp_path, 0, 10)
    description = json.loads((path / "snapshot.json").read_text())
    (path / "snapshot.json").write_text(json.dumps(description | {"format": 99}))
    with pytest.raises(InputError, match="has format 99, and this densedino reads 1"):
        find_snapshot(tmp_path, announce=pytest.fail)
    assert path.is_dir()


def test_differences_are_readable_and_free_fields_do_not_count():
    before = {"seed": 0, "stages": [{"steps": 100, "name": "a"}], "data": {"workers": 2, "mean": [0.5]}, "gone": 1}
    now = {"seed": 1, "stages": [{"steps": 200, "name": "a"}], "data": {"workers": 4, "mean": [0.5, 0.5]}}
    assert config_differences(before, now, free=("data.workers",)) == [
        "seed: 0 before, 1 now",
        "stages[0].steps: 100 before, 200 now",
        "data.mean: [0.5] before, [0.5, 0.5] now",
        "gone: 1 before, nothing now",
    ]
    assert config_differences(before, before) == []
    assert config_differences(before, now | {"gone": 1}, free=("data", "stages", "seed")) == []
