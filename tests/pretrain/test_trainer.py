from __future__ import annotations

import json
import os
import signal
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import densedino as dd
from densedino.errors import InputError, TrainingError
from densedino.models.catalog import create_model
from densedino.pretrain.outcome import write_outcome
from densedino.pretrain.settings import GramConfig, HeadConfig, MonitorConfig, RunConfig, SnapshotConfig
from densedino.pretrain.trainer import pretrain
from densedino.pretrain.variants import with_batch_size, with_channels, with_steps
from densedino.recipes import recipe

HEAD = HeadConfig(hidden_dim=16, bottleneck_dim=8, num_prototypes=16)


class Made:
    """Noise, some of it NaN."""

    def __init__(self, number=12, *, channels=3, bad=()):
        self.number, self.channels, self.bad = number, channels, bad

    def __len__(self):
        return self.number

    def name(self, index):
        return f"made#{index}"

    def read(self, index):
        g = torch.Generator().manual_seed(index)
        image = torch.rand(self.channels, 24, 32, generator=g)
        return image.fill_(torch.nan) if index in self.bad else image


def config(*, steps=8, batch=4) -> RunConfig:
    run = with_steps(with_batch_size(recipe("debug"), batch), steps)
    return replace(
        run,
        dino_head=HEAD,
        ibot_head=HEAD,
        data=replace(run.data, workers=0),
        snapshots=SnapshotConfig(every=3, keep=2),
        monitor=MonitorConfig(log_every=1, look_every=100, images=4, size=32, tensorboard=False, seconds=1.0),
    )


def train(run, output, *, source=None, stop_at=None, **options):
    lines: list[str] = []

    def advance(progress):
        if progress.total == stop_at:
            signal.raise_signal(signal.SIGTERM)

    result = pretrain(
        run, output=output, sources=[source or Made()], device="cpu", say=lines.append, advance=advance, **options
    )
    return result, lines


def metrics(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def losses(output):
    return [line["losses"]["total"] for line in metrics(output)]


def assert_same_weights(one, other):
    mine, theirs = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert mine.keys() == theirs.keys()
    assert [key for key, value in mine.items() if not torch.equal(value, theirs[key])] == []


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of all three stages that was never interrupted."""
    output = tmp_path_factory.mktemp("whole") / "run"
    result, lines = train(config(), output)
    return output, result, lines


def test_three_stages_end_in_a_file_that_loads(whole):
    output, result, lines = whole
    assert (result.weights, result.steps, result.skipped, result.quarantined) == (
        output / "model.safetensors", 8, 0, 0,
    )  # fmt: skip
    assert dd.load(weights=result.weights).card.model == "debug_vit"
    assert [line["step"] for line in metrics(output)] == list(range(1, 9))
    assert [(line["stage"], line["stage_step"]) for line in metrics(output)][-3:] == [
        ("gram", 2), ("highres", 1), ("highres", 2),
    ]  # fmt: skip
    assert metrics(output)[-1]["images"] == 8 * 4
    assert "gram" in metrics(output)[-1]["losses"]
    assert sorted(path.name for path in (output / "snapshots").iterdir()) == ["step-00000006", "step-00000008"]
    assert json.loads((output / "config.json").read_text())["model"] == "debug_vit"
    assert (output / "report.html").exists()
    assert any(line.startswith("highres: Gram teacher: a copy of the teacher") for line in lines)


@pytest.mark.parametrize("stop_at", [1, 4, 6])
def test_a_signal_stops_it_and_it_goes_on_bit_for_bit(whole, tmp_path, stop_at):
    result, lines = train(config(), tmp_path / "run", stop_at=stop_at)
    assert (result.weights, result.steps) == (None, stop_at)
    assert lines[-1] == f"stopped after step {stop_at}: run the same command again to go on"
    _, lines = train(config(), tmp_path / "run")
    assert lines[0] == f"goes on after step {stop_at} of 8"
    assert_same_weights(tmp_path / "run", whole[0])
    assert losses(tmp_path / "run") == losses(whole[0])


def test_a_damaged_snapshot_costs_some_steps_and_no_bit(whole, tmp_path):
    train(config(), tmp_path / "run", stop_at=7)
    os.truncate(tmp_path / "run" / "snapshots" / "step-00000007" / "optimizer.safetensors", 1000)
    _, lines = train(config(), tmp_path / "run")
    assert "step-00000007 is damaged" in lines[0]
    assert lines[1] == "goes on after step 6 of 8"
    assert_same_weights(tmp_path / "run", whole[0])
    assert losses(tmp_path / "run") == losses(whole[0])


def test_a_finished_run_is_finished(whole, tmp_path):
    output, before, _ = whole
    result, lines = train(config(), output)
    assert (result, lines) == (before, ["goes on after step 8 of 8"])


def test_another_configuration_is_refused_readably_and_can_be_insisted_on(tmp_path):
    train(config(), tmp_path / "run", stop_at=2)
    other = replace(config(), seed=1, snapshots=SnapshotConfig(every=2))
    with pytest.raises(InputError) as error:
        train(other, tmp_path / "run")
    assert "another configuration:\n  seed: 0 before, 1 now\n" in str(error.value)
    assert "snapshots" not in str(error.value)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["seed"] == 0
    result, lines = train(other, tmp_path / "run", accept_changes=True)
    assert lines[0] == "goes on with another configuration than before:\n  seed: 0 before, 1 now"
    assert result.weights is not None


def test_fields_that_change_no_result_may_change(whole, tmp_path):
    train(config(), tmp_path / "run", stop_at=5)
    run = replace(config(), snapshots=SnapshotConfig(every=1), data=replace(config().data, prefetch=1))
    train(run, tmp_path / "run")
    assert_same_weights(tmp_path / "run", whole[0])


def test_other_pictures_are_mentioned(tmp_path):
    train(config(), tmp_path / "run", stop_at=2)
    _, lines = train(config(), tmp_path / "run", source=Made(13))
    assert lines[0] == "the sources have [13] pictures, and had [12]: they come in another order from here on"


def test_a_contradiction_is_found_before_anything_is_done(tmp_path):
    run = config()
    gram = replace(run.stages[2].losses, gram=GramConfig(source="ema"))
    with pytest.raises(InputError, match=r"stages\[2\] \(highres\)"):
        train(replace(run, stages=(*run.stages[:2], replace(run.stages[2], losses=gram))), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_step_that_is_not_finite_is_counted_and_its_samples_named(tmp_path):
    run = replace(config(steps=12), stages=with_steps(config(), 12).stages[:1])
    result, lines = train(run, tmp_path / "run", source=Made(40, bad=(7,)))
    said = [line for line in lines if "changed nothing" in line]
    assert result.skipped == len(said) <= 1
    result, lines = train(run, tmp_path / "other", source=Made(8, bad=(7,)), stop_at=2)
    said = [line for line in lines if "changed nothing" in line]
    assert said
    assert all(line.endswith("samples: made#7") for line in said)
    unfinished = [line for line in metrics(tmp_path / "other") if not line["finite"]]
    assert len(unfinished) == len(said) == result.skipped
    assert unfinished[0]["suspects"] == ["made#7"]
    assert all(torch.isfinite(v).all() for v in load_file(_newest(tmp_path / "other") / "model.safetensors").values())


def _newest(output):
    return max((output / "snapshots").iterdir())


def test_many_steps_that_are_not_finite_end_the_run(tmp_path):
    with pytest.raises(TrainingError, match=r"5 of the last 50 steps were not finite.*made#\d"):
        train(config(steps=12), tmp_path / "run", source=Made(4, bad=range(4)))
    assert len(metrics(tmp_path / "run")) == 5


def test_micro_batches_give_the_same_losses(tmp_path):
    """From features that differ: a fresh network's are alike, and KoLeo's logarithm magnifies their last bits."""
    run = config()
    backbone = create_model("debug_vit", device="cpu")
    for block in backbone.blocks:
        torch.nn.init.constant_(block.ls1.gamma, 0.5)
        torch.nn.init.constant_(block.ls2.gamma, 0.5)
    start = write_outcome(backbone, tmp_path / "start.safetensors", config=run, pictures=[], origin=None)
    stages = [replace(s, losses=replace(s.losses, koleo_group_size=2)) for s in run.stages]
    stages[0] = replace(stages[0], start=str(start))
    for name, size in (("four", 4), ("two", 2)):
        train(replace(run, stages=tuple(stages), micro_batch_size=size), tmp_path / name)
    torch.testing.assert_close(losses(tmp_path / "two"), losses(tmp_path / "four"), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("how", ["selective", "full"])
def test_recomputing_activations_changes_no_loss(whole, tmp_path, how):
    train(replace(config(), activation_checkpointing=how), tmp_path / "run")
    torch.testing.assert_close(losses(tmp_path / "run"), losses(whole[0]), rtol=1e-6, atol=0.0)


def test_it_goes_on_from_weights_with_more_channels(whole, tmp_path):
    run = with_channels(config(), mean=(0.5,) * 5, std=(0.25,) * 5, rgb=(2, 1, 0))
    start = replace(run.stages[0], start=str(whole[1].weights), frozen_backbone_steps=2)
    run = replace(run, stages=(start, *run.stages[1:]))
    result, lines = train(run, tmp_path / "run", source=Made(channels=5))
    assert "pretrain: patch embedding: 3 → 5 channels, mean, rgb=(2, 1, 0)" in lines
    card = dd.load(weights=result.weights).card
    assert card.in_chans == 5
    assert card.mean == (0.5,) * 5
    assert any(note.startswith("started from debug_vit") for note in card.notes)
    (tmp_path / "run" / "model.safetensors").unlink()
    whole[1].weights.rename(tmp_path / "away")  # what it started from is not needed any more
    try:
        again, _ = train(run, tmp_path / "run", source=Made(channels=5))
    finally:
        (tmp_path / "away").rename(whole[1].weights)
    assert dd.load(weights=again.weights).card.notes == card.notes
