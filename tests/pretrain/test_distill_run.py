from __future__ import annotations

import json
import signal

import pytest
import torch
from torch import nn

from densedino.errors import InputError, TrainingError
from densedino.models.catalog import model_spec
from densedino.pretrain.crops import CropConfig
from densedino.pretrain.distill_run import make_student, run_job, write_student
from densedino.pretrain.schedules import constant
from densedino.pretrain.settings import DataConfig, OptimizerConfig, Resolution, SnapshotConfig, StageConfig
from densedino.pretrain.step import StepReport
from densedino.weights.loading import load_weights

STAGE = StageConfig(
    name="distill",
    steps=7,
    batch_size=2,
    resolutions=(
        Resolution(crops=CropConfig(mean=(0.5,) * 3, std=(0.25,) * 3, global_size=32, num_global=1, num_local=0)),
    ),
    optimizer=OptimizerConfig(lr=constant(1e-2), lr_scaling="none"),
    start="random",
)


class Made:
    def __len__(self):
        return 5

    def name(self, index):
        return f"made#{index}"

    def read(self, index):
        return torch.rand(3, 40, 40, generator=torch.Generator().manual_seed(index))


class Job:
    """The smallest thing that learns: the mean colour."""

    def __init__(self, *, broken=()):
        torch.manual_seed(0)
        self.model, self.broken, self.calibrated = nn.Linear(3, 1), broken, 0
        self.optimizers = {"one": torch.optim.AdamW(self.model.parameters(), lr=1e-2)}

    def begin(self, batches):
        self.calibrated = sum(map(len, batches))
        return ["ready"]

    def take(self, batch, *, values, step):
        loss = self.model(batch.crops.global_crops.mean((0, 3, 4))).square().mean()
        finite = step not in self.broken
        if finite:
            self.optimizers["one"].zero_grad()
            loss.backward()
            self.optimizers["one"].step()
        return {
            "one": StepReport(
                losses={"total": loss.item() if finite else float("nan")}, gradient_norms={}, finite=finite,
                values=values, sample_ids=batch.sample_ids, features={},
            )
        }  # fmt: skip

    def finish(self, folder, *, pictures):
        assert pictures == [("Made", 5)]
        torch.save(self.model.state_dict(), folder / "one.pt")
        return [folder / "one.pt"]


def go(output, job=None, *, stop_at=None, config=None, **options):
    lines = []

    def advance(progress):
        if progress.step == stop_at:
            signal.raise_signal(signal.SIGTERM)

    result = run_job(
        job or Job(),
        config=config or {"seed": 0},
        stage=STAGE,
        sources=[Made()],
        data=DataConfig(workers=0),
        snapshots=SnapshotConfig(every=3, keep=2),
        seed=0,
        output=output,
        device=torch.device("cpu"),
        log_every=1,
        say=lines.append,
        advance=advance,
        **options,
    )
    return result, lines


def test_a_run_that_was_stopped_ends_as_one_that_was_not(tmp_path):
    whole, _ = go(tmp_path / "whole")
    first, lines = go(tmp_path / "parts", stop_at=4)
    assert (first.weights, first.steps, lines[-1][:20]) == ((), 4, "stopped after step 4")
    second, lines = go(tmp_path / "parts")
    assert lines == ["ready", "goes on after step 4 of 7"]
    ours, theirs = (torch.load(r.weights[0], weights_only=True) for r in (second, whole))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    steps = [json.loads(line)["step"] for line in (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 8))


def test_another_configuration_is_refused(tmp_path):
    go(tmp_path, stop_at=3)
    with pytest.raises(InputError, match="seed: 0 before, 1 now"):
        go(tmp_path, config={"seed": 1})
    result, _ = go(tmp_path, config={"seed": 1}, accept_changes=True)
    assert result.steps == 7


def test_calibration_takes_pictures_of_no_step(tmp_path):
    job = Job()
    go(tmp_path, job, calibration=3)
    assert job.calibrated == 4


def test_steps_that_are_not_finite_are_said_and_end_a_run(tmp_path):
    result, lines = go(tmp_path / "a", Job(broken=(2,)))
    assert result.steps == 7
    assert "step 3 changed nothing" in " ".join(lines)
    with pytest.raises(TrainingError, match="5 of the last"):
        go(tmp_path / "b", Job(broken=range(7)))


def test_students_begin_by_seed_or_weights_and_end_loadable(tmp_path):
    spec = model_spec("debug_vit")
    one, same, other = (make_student(spec, stage=STAGE, seed=0, number=n) for n in (0, 0, 1))
    assert torch.equal(one.cls_token, same.cls_token)
    assert not torch.equal(one.cls_token, other.cls_token)
    path = write_student(one, tmp_path / "s.safetensors", spec=spec, stage=STAGE, pictures=[("a", 5)], how="so")
    loaded, card = load_weights(weights=path)
    assert torch.equal(loaded.cls_token, one.cls_token)
    assert (card.data, card.mean) == ("a (5 pictures)", (0.5,) * 3)
    assert "so, by densedino" in card.notes[0]
    from dataclasses import replace

    again = make_student(spec, stage=replace(STAGE, start=str(path)), seed=0)
    assert torch.equal(again.cls_token, one.cls_token)
    with pytest.raises(InputError, match="the student is a debug_convnext"):
        make_student(model_spec("debug_convnext"), stage=replace(STAGE, start=str(path)), seed=0)
