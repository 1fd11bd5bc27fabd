from __future__ import annotations

import signal
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import densedino as dd
from densedino.errors import InputError
from densedino.models.catalog import create_model
from densedino.pretrain.feature_distill import TeacherConfig
from densedino.pretrain.feature_run import FeatureDistillConfig, FeatureJob, distill_features
from densedino.pretrain.settings import DataConfig, Resolution, SnapshotConfig
from densedino.pretrain.teachers import BackboneTeacher, ModuleTeacher, Tokens
from densedino.recipes.distillation import from_features

PLAIN = ((0.0,) * 3, (1.0,) * 3)


class Made:
    def __len__(self):
        return 5

    def name(self, index):
        return f"made#{index}"

    def read(self, index):
        g = torch.Generator().manual_seed(index)
        return torch.randint(0, 256, (3, 90, 120), generator=g, dtype=torch.uint8)


def config(*teachers, **changes) -> FeatureDistillConfig:
    run = from_features(teachers or (TeacherConfig(source="a"),), model="debug_vit", size=64, steps=4, batch_size=2)
    return replace(
        run, calibration=4, data=DataConfig(workers=0), snapshots=SnapshotConfig(every=2), log_every=1, **changes
    )


def teacher():
    torch.manual_seed(3)
    return ModuleTeacher(nn.Conv2d(3, 10, 8, 8), name="a", stride=8, statistics=PLAIN)


def go(run, output, *, stop_at=None, **options):
    def advance(progress):
        if progress.step == stop_at:
            signal.raise_signal(signal.SIGTERM)

    quiet = {"sources": [Made()], "device": "cpu", "say": lambda _: None, "advance": advance}
    return distill_features(run, output=output, **{"teachers": [teacher()], **quiet, **options})


@pytest.mark.parametrize("cached", [False, True])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(tmp_path, cached):
    run = config(TeacherConfig(source="a", cached=cached, size=96, gram_weight=0.5))
    whole = go(run, tmp_path / "whole")
    assert go(run, tmp_path / "parts", stop_at=3).weights == ()
    parts = go(run, tmp_path / "parts")
    ours, theirs = (load_file(result.weights[0]) for result in (parts, whole))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    card = dd.load(weights=whole.weights[0]).card
    assert card.model == "debug_vit"
    assert "headless distillation from a" in card.notes[0]
    assert (tmp_path / "whole" / "teachers").exists() == cached


def test_any_module_is_a_student(tmp_path):
    torch.manual_seed(0)
    student = nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.GELU())
    before = student[0].weight.clone()
    result = go(config(), tmp_path, backbone=student)
    state = load_file(tmp_path / "student.safetensors")
    assert result.weights == (tmp_path / "student.safetensors",)
    assert not torch.equal(state["0.weight"], before)


def test_teachers_see_what_the_student_sees_without_its_colours():
    run = config(TeacherConfig(source="a"), TeacherConfig(source="b", size=96))
    seen = []

    def spy(x):
        seen.append(x)
        return x[:, :, ::8, ::8]

    spies = [ModuleTeacher(spy, name=name, stride=8, statistics=PLAIN) for name in "ab"]
    job = FeatureJob(run, create_model("debug_vit"), spies, sources=[Made()], cache=None)
    from densedino.pretrain.loading import Loader

    batch = next(iter(Loader([Made()], stage=run.stage, seed=0, data=run.data)))
    for ask in job._asks:
        assert isinstance(ask(batch), Tokens)
    settings = run.stage.resolutions[0].crops
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (settings.mean, settings.std))
    side = batch.crops.global_crops.shape[-1]
    torch.testing.assert_close(seen[0], (batch.crops.gram_crops[0] * std + mean).clamp(0, 1))
    assert [x.shape[-1] for x in seen] == [side, 96]


def test_cached_and_online_targets_are_of_the_same_places():
    # A teacher that says the mean colour of each patch: cut from whole pictures or asked about crops, nearly the same.
    run = config(TeacherConfig(source="a"), TeacherConfig(source="a", cached=True, size=90))
    run = replace(run, stage=replace(run.stage, resolutions=(Resolution(crops=run.stage.resolutions[0].crops),)))

    class Smooth(Made):
        def read(self, index):
            rows, cols = torch.meshgrid(torch.linspace(0, 1, 90), torch.linspace(0, 1, 120), indexing="ij")
            return torch.stack([rows, cols, rows * cols])

    means = [
        ModuleTeacher(lambda x: nn.functional.avg_pool2d(x, 2), name="m", stride=2, statistics=PLAIN) for _ in range(2)
    ]
    import tempfile
    from pathlib import Path

    from densedino.pretrain.loading import Loader

    with tempfile.TemporaryDirectory() as folder:
        job = FeatureJob(run, create_model("debug_vit"), means, sources=[Smooth()], cache=Path(folder))
        batch = next(iter(Loader([Smooth()], stage=run.stage, seed=0, data=run.data)))
        online, cached = (ask(batch).maps[0] for ask in job._asks)
    online = nn.functional.avg_pool2d(online, online.shape[-1] // cached.shape[-1])
    torch.testing.assert_close(online, cached, atol=0.02, rtol=0)


def test_contradictions_are_refused(tmp_path):
    with pytest.raises(InputError, match="no teachers"):
        replace(config(), teachers=())
    with pytest.raises(InputError, match="2 images or more"):
        replace(config(), calibration=1)
    with pytest.raises(InputError, match="num_local=0"):
        crops = replace(config().stage.resolutions[0].crops, num_local=2)
        replace(config(), stage=replace(config().stage, resolutions=(Resolution(crops=crops),)))
    with pytest.raises(InputError, match="2 teachers, but the configuration has 1"):
        go(config(), tmp_path, teachers=[teacher(), BackboneTeacher(create_model("debug_vit"), name="d")])
    with pytest.raises(InputError, match="no data"):
        distill_features(config(), output=tmp_path, teachers=[teacher()], device="cpu")
