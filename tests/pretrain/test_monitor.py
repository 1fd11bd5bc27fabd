"""Watching a run: files, resumption, failures, and that the run does not notice."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from densedino.errors import InputError
from densedino.pretrain import monitor as monitor_module
from densedino.pretrain.crops import Crops
from densedino.pretrain.look_files import read_looks
from densedino.pretrain.monitor import Monitor
from densedino.pretrain.settings import MonitorConfig
from densedino.pretrain.step import Batch, step_values, train_step
from densedino.pretrain.student_teacher import StudentTeacher, make_optimizer
from densedino.recipes import recipe

if TYPE_CHECKING:
    from pathlib import Path

    from densedino.pretrain.settings import RunConfig

QUICK = MonitorConfig(size=32, images=20, tensorboard=False)


class Pictures:
    def __len__(self) -> int:
        return 24

    def name(self, index: int) -> str:
        return f"picture {index}"

    def read(self, index: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(index)
        return torch.randint(0, 256, (3, 40, 48), generator=generator, dtype=torch.uint8)


@pytest.fixture
def config() -> RunConfig:
    return replace(recipe("debug"), monitor=QUICK)


@pytest.fixture
def folder(tmp_path: Path, config: RunConfig) -> Path:
    (tmp_path / "config.json").write_text(
        json.dumps({"stages": [{"name": s.name, "steps": s.steps} for s in config.stages]})
    )
    return tmp_path


def make(folder: Path, config: RunConfig, *, step: int = 0, said: list[str] | None = None) -> Monitor:
    said = [] if said is None else said
    return Monitor(folder, config, sources=[Pictures()], step=step, announce=said.append)


def state_of(config: RunConfig) -> StudentTeacher:
    torch.manual_seed(0)
    return StudentTeacher(config).train()


def test_looks_are_due_at_the_ends_and_at_intervals(folder: Path, config: RunConfig) -> None:
    monitor = make(folder, replace(config, monitor=replace(QUICK, look_every=7)))
    total = sum(stage.steps for stage in config.stages)
    assert [step for step in range(total + 1) if monitor.is_due(step)] == sorted({*range(0, total + 1, 7), total})
    assert sum(make(folder, config).is_due(step) for step in range(total + 1)) <= 22


def test_a_look_is_written_with_its_drifts_and_the_report(folder: Path, config: RunConfig) -> None:
    said: list[str] = []
    monitor, state = make(folder, config, said=said), state_of(config)
    for step in (0, 1, 2):
        monitor.look(step, state.teacher.backbone, stage=config.stages[0].name)
        with torch.no_grad():
            for parameter in state.teacher.backbone.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step))
    monitor.close()
    assert said == []
    looks = read_looks(folder)
    assert [look.step for look in looks] == [0, 1, 2]
    assert "drift_from_stage_start" not in looks[0].measures
    assert looks[1].measures["drift_from_stage_start"] == looks[1].measures["drift_from_best"] > 0
    assert looks[2].measures["drift_from_stage_start"] > 0
    assert (folder / "report.html").exists()
    assert (folder / "report.png").exists()


def test_a_repeated_look_replaces_the_old_one_and_is_the_same(folder: Path, config: RunConfig) -> None:
    state = state_of(config)
    first = make(folder, config).look(5, state.teacher.backbone, stage="a")
    files = sorted(path.name for path in (folder / "looks").iterdir())
    resumed = make(folder, config, step=5)
    assert resumed.observer.sizes == first.sizes, "sizes are those of the run's first look"
    again = resumed.look(5, state.teacher.backbone, stage="a")
    assert again.measures == first.measures
    assert sorted(path.name for path in (folder / "looks").iterdir()) == files


def test_a_look_that_fails_is_recorded_and_the_run_goes_on(folder: Path, config: RunConfig) -> None:
    said: list[str] = []
    monitor, state = make(folder, config, said=said), state_of(config)
    record = monitor.look(3, state.student.backbone, stage="a")  # in training mode
    assert "training mode" in record.failed
    assert said == [f"the look at step 3 failed: {record.failed}"]
    assert read_looks(folder) == [record]
    assert monitor.look(4, state.teacher.backbone, stage="a").measures


def test_a_report_that_fails_is_announced(folder: Path, config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monitor = make(folder, config, said=said)

    def full(_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(monitor_module, "write_report", full)
    monitor.close()
    assert said == ["the report could not be written: OSError: no space left"]


def test_reports_between_looks_come_by_time(folder: Path, config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monitor = make(folder, config)
    monitor.record(1, {"losses": {"total": 1.0}})
    assert not (folder / "report.html").exists()
    monkeypatch.setattr(monitor_module, "REPORT_SECONDS", 0.0)
    monitor.record(2, {"losses": {"total": 1.0}})
    assert (folder / "report.html").exists()


def test_a_folder_that_is_no_probe_stops_the_run_before_it_begins(folder: Path, config: RunConfig) -> None:
    for wrong in (replace(QUICK, knn=str(folder / "none")), replace(QUICK, segmentation=str(folder))):
        with pytest.raises(InputError):
            make(folder, replace(config, monitor=wrong))


def batch_of(config: RunConfig, step: int) -> Batch:
    crops = config.stages[0].resolutions[0].crops
    generator = torch.Generator().manual_seed(step)
    side, patches = crops.global_size, (crops.global_size // config.spec.stride) ** 2
    return Batch(
        crops=Crops(
            global_crops=torch.randn(2, 16, 3, side, side, generator=generator),
            local_crops=torch.randn(crops.num_local, 16, 3, crops.local_size, crops.local_size, generator=generator),
        ),
        masks=torch.rand(2, 16, patches, generator=generator) > 0.5,
        sample_ids=tuple("abcdefghijklmnop"),
        places=range(16),
    )


def test_a_run_that_is_watched_is_the_same_run(folder: Path, config: RunConfig) -> None:
    ends = []
    for watched in (False, True):
        state, stage = state_of(config), config.stages[0]
        optimizer = make_optimizer(state.student, stage.optimizer, fidelity=config.fidelity)
        monitor = make(folder, config)
        for step in range(3):
            values = step_values(stage, step)
            report = train_step(state, optimizer, batch_of(config, step), stage=stage, values=values, seed=0, step=step)
            assert 0 < report.prototype_entropy["dino"] <= 1
            if watched:
                monitor.record(step, {"losses": report.losses})
                assert monitor.look(step, state.teacher.backbone, stage=stage.name).measures
        ends.append({name: value.clone() for name, value in state.state_dict().items()})
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_tensorboard_has_numbers_once_however_often_a_run_resumes(folder: Path, config: RunConfig) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = replace(config, monitor=replace(QUICK, tensorboard=True))
    for start, stop in ((0, 6), (4, 8)):
        monitor = make(folder, config, step=start)
        for step in range(start + 1, stop + 1):
            monitor.record(step, {"step": step, "losses": {"dino": float(step)}, "none": None})
        monitor.close()
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert events.Tags()["scalars"] == ["losses/dino"]
    assert [event.step for event in events.Scalars("losses/dino")] == list(range(1, 9))


def test_without_tensorboard_installed_nothing_is_missed(
    folder: Path, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(*_: object, **__: object) -> None:
        raise ImportError

    monkeypatch.setattr(monitor_module, "require", absent)
    monitor = make(folder, replace(config, monitor=replace(QUICK, tensorboard=True)))
    monitor.record(1, {"losses": {"dino": 1.0}})
    monitor.close()
    assert not (folder / "tensorboard").exists()
