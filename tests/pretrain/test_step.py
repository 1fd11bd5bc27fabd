"""One step: the same however it is split, nothing where something is not finite, every model of the table."""

from __future__ import annotations

import copy
import doctest
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from densedino.errors import InputError
from densedino.models.catalog import list_models, model_spec
from densedino.models.rope import RopeAugment
from densedino.pretrain.crops import CropConfig, Crops
from densedino.pretrain.schedules import StagedSchedule, constant
from densedino.pretrain.settings import (
    GramConfig,
    HeadConfig,
    LossConfig,
    OptimizerConfig,
    Resolution,
    RunConfig,
    StageConfig,
)
from densedino.pretrain.step import Batch, StepReport, step_values, train_step
from densedino.pretrain.student_teacher import StudentTeacher, make_optimizer
from densedino.recipes import recipe

B = 8


class Training:
    """A state with its optimizer, on crops that the step number determines."""

    def __init__(self, model: str = "debug_vit", *, fresh: bool = False, lr: float = 0.05, **changes) -> None:
        self.stage = replace(
            StageConfig(
                name="only",
                start="random",
                steps=50,
                batch_size=B,
                resolutions=(Resolution(crops=CropConfig(mean=(0.5,) * 3, std=(0.5,) * 3)),),
                optimizer=OptimizerConfig(lr=constant(lr), momentum=constant(0.9)),
                losses=LossConfig(koleo_group_size=4),
            ),
            **changes,
        )
        head = HeadConfig(hidden_dim=24, bottleneck_dim=16, num_prototypes=48)
        self.config = RunConfig(model=model, stages=(self.stage,), dino_head=head, ibot_head=head)
        self.stride = model_spec(model).stride
        self.state = StudentTeacher(self.config)
        if not fresh:
            with torch.no_grad():
                for name, parameter in self.state.named_parameters():
                    if "gamma" in name:
                        parameter.fill_(0.5)
                    elif parameter.ndim > 1:
                        parameter.mul_(3.0)
        if self.stage.losses.gram is not None and self.stage.losses.gram.source == "checkpoint":
            self.state.set_gram_teacher(self.state.teacher.backbone)
        self.optimizer = make_optimizer(self.state.student, self.stage.optimizer, fidelity="released")

    def batch(self, step: int, *, masked: float = 0.4, local: int = 3) -> Batch:
        g = torch.Generator().manual_seed(step)
        size = 2 * self.stride
        crops = Crops(
            global_crops=torch.randn(2, B, 3, size, size, generator=g),
            local_crops=torch.randn(local, B, 3, self.stride, self.stride, generator=g),
        )
        masks = torch.rand(2, B, 4, generator=g) < masked
        return Batch(crops=crops, masks=masks, sample_ids=tuple(f"image {i}" for i in range(B)), places=range(B))

    def step(self, number: int, *, batches=None, precision="fp32", **batch) -> StepReport:
        return train_step(
            self.state,
            self.optimizer,
            batches if batches is not None else self.batch(number, **batch),
            stage=self.stage,
            values=step_values(self.stage, number),
            seed=3,
            step=number,
            precision=precision,
        )

    def everything(self) -> dict[str, torch.Tensor]:
        moments = {
            f"{index}.{name}": value
            for index, entry in self.optimizer.state_dict()["state"].items()
            for name, value in entry.items()
        }
        return {name: value.clone() for name, value in (self.state.state_dict() | moments).items()}


def close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float) -> bool:
    assert one.keys() == other.keys()
    return all(torch.allclose(one[name], other[name], rtol=tolerance, atol=tolerance) for name in one)


CHANCE = {"drop_path": 0.3, "rope": RopeAugment(rescale=2.0, per_block=True)}


@pytest.mark.parametrize("model", list_models("debug_*"))
@pytest.mark.parametrize("sizes", [[4, 4], [4, 1, 3]])
def test_micro_batches_make_the_step_of_the_whole_batch(model: str, sizes: list[int]) -> None:
    koleo = LossConfig(koleo_group_size=4, koleo_weight=0.1 if sizes == [4, 4] else 0.0, gram=GramConfig())
    changes = CHANCE | {"losses": koleo} | ({"rope": None} if "convnext" in model else {})
    whole, parts = Training(model, **changes), Training(model, **changes)
    for step in range(3):
        batch = whole.batch(step)
        one = whole.step(step)
        ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        micro = [batch.split(1)[end - size : end] for end, size in zip(ends, sizes, strict=True)]
        other = parts.step(step, batches=[joined(m) for m in micro])
        assert one.losses == pytest.approx(other.losses, rel=1e-5)
        assert one.gradient_norms == pytest.approx(other.gradient_norms, rel=1e-4)
        assert one.sample_ids == other.sample_ids
        for name, value in one.features.items():
            torch.testing.assert_close(value, other.features[name], rtol=1e-3, atol=1e-4)
    assert close(whole.state.state_dict(), parts.state.state_dict(), 2e-3)


def joined(batches: list[Batch]) -> Batch:
    crops = [batch.crops for batch in batches]
    return Batch(
        crops=Crops(
            global_crops=torch.cat([c.global_crops for c in crops], dim=1),
            local_crops=torch.cat([c.local_crops for c in crops], dim=1),
        ),
        masks=torch.cat([batch.masks for batch in batches], dim=1),
        sample_ids=tuple(name for batch in batches for name in batch.sample_ids),
        places=range(batches[0].places.start, batches[-1].places.stop),
    )


def test_chance_depends_on_seed_and_step_and_nothing_else() -> None:
    one, other = Training(**CHANCE), Training(**CHANCE)
    torch.manual_seed(1)
    first = one.step(4)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert other.step(4).losses == first.losses
    assert torch.equal(torch.get_rng_state(), before), "the global generator is not touched"
    assert all(torch.equal(a, b) for a, b in zip(one.everything().values(), other.everything().values(), strict=True))
    third = Training(**CHANCE)
    assert third.step(5, batches=third.batch(4)).losses != first.losses


@pytest.mark.parametrize("model", list_models("debug_*"))
def test_every_model_learns_a_batch_by_heart(model: str) -> None:
    optimizer = OptimizerConfig(lr=constant(0.02), momentum=constant(0.99), teacher_temperature=constant(0.04))
    losses = LossConfig(koleo_weight=0.0, gram=GramConfig(source="ema", weight=constant(0.1)))
    training = Training(model, fresh=True, losses=losses, drop_path=0.1, optimizer=optimizer)
    batch = training.batch(0)
    totals = [training.step(step, batches=batch).losses["total"] for step in range(40)]
    assert sum(totals[-5:]) / 5 < sum(totals[:5]) / 5 - 0.005


def poisoned(training: Training, what: str) -> Batch:
    batch = training.batch(2)
    if what == "global crop":
        batch.crops.global_crops[1, 5, 0, 0, 0] = torch.nan
    elif what == "local crop":
        batch.crops.local_crops[2, 5, 0, 0, 0] = torch.inf
    return batch


@pytest.mark.parametrize("what", ["global crop", "local crop", "prototypes", "gradient"])
@pytest.mark.parametrize("split", [None, 2])
def test_a_step_that_is_not_finite_changes_nothing(what: str, split: int | None) -> None:
    training = Training(losses=LossConfig(koleo_weight=0.0, gram=GramConfig()))
    for step in range(2):
        training.step(step)
    if what == "prototypes":
        with torch.no_grad():
            training.state.student.ibot_head.last_layer.weight[0, 0] = 1e38
    elif what == "gradient":
        training.state.student.backbone.norm.bias.register_hook(lambda gradient: gradient * torch.nan)
    before = training.everything()
    report = training.step(2, batches=poisoned(training, what).split(split))
    assert not report.finite
    assert all(torch.equal(value, before[name]) for name, value in training.everything().items())
    assert all(parameter.grad is None for parameter in training.state.parameters())
    if "crop" in what:
        assert report.suspects == ("image 5",)
    else:
        assert report.suspects == report.sample_ids


def test_training_goes_on_after_a_step_that_is_not_finite_as_if_it_had_not_been() -> None:
    one, other = Training(), Training()
    one.step(0)
    one.step(1, batches=poisoned(one, "global crop"))
    assert one.step(2).losses == other_steps(other)


def other_steps(training: Training) -> dict[str, float]:
    training.step(0)
    return training.step(2).losses


def test_teachers_move_only_as_they_should() -> None:
    gram = GramConfig(first_update=2, update_every=3, max_updates=2)
    training = Training(losses=LossConfig(koleo_group_size=4, gram=gram))
    state = training.state
    refreshed = []
    for step in range(12):
        anchor = copy.deepcopy(state.gram_teacher.state_dict())
        teacher = copy.deepcopy(state.teacher.state_dict())
        report = training.step(step)
        refreshed += [step] if report.gram_refreshed else []
        kept = teacher if report.gram_refreshed else {f"backbone.{name}": value for name, value in anchor.items()}
        assert all(torch.equal(v, kept[f"backbone.{name}"]) for name, v in state.gram_teacher.state_dict().items())
        student = dict(state.student.named_parameters())
        for name, parameter in state.teacher.named_parameters():
            torch.testing.assert_close(parameter, 0.9 * teacher[name] + 0.1 * student[name])
    assert refreshed == [2, 5]


def test_a_frozen_backbone_stays_and_heads_learn() -> None:
    training = Training(frozen_backbone_steps=2, losses=LossConfig(koleo_group_size=4, gram=GramConfig()))
    before = training.everything()
    reports = [training.step(step) for step in range(2)]
    after = training.everything()
    for name in before:
        moved = not torch.equal(before[name], after[name])
        assert moved == ("_head." in name), name
    assert reports[0].gradient_norms["backbone"] == 0
    assert "koleo" not in reports[0].losses
    assert training.step(2).gradient_norms["backbone"] > 0
    assert not torch.equal(training.everything()["student.backbone.norm.bias"], before["student.backbone.norm.bias"])


def test_prototypes_stay_while_they_are_frozen() -> None:
    training = Training(optimizer=OptimizerConfig(lr=constant(0.05), last_layer_freeze_steps=1))
    name = "student.dino_head.last_layer.weight"
    before = training.everything()
    training.step(0)
    assert torch.equal(training.everything()[name], before[name])
    assert not torch.equal(
        training.everything()["student.dino_head.mlp.0.weight"], before["student.dino_head.mlp.0.weight"]
    )
    training.step(1)
    assert not torch.equal(training.everything()[name], before[name])


@pytest.mark.parametrize(
    ("changes", "batch", "absent"),
    [
        ({}, {"masked": 0.0}, set()),
        ({}, {"masked": 1.1}, set()),
        ({}, {"local": 0}, {"dino_local"}),
        ({"losses": LossConfig(ibot_weight=0.0, koleo_group_size=4)}, {}, {"ibot"}),
        ({"losses": LossConfig(dino_weight=0.0, koleo_weight=0.0)}, {}, {"dino_global", "dino_local", "koleo"}),
        ({"losses": LossConfig(local_weight=constant(0.0), koleo_group_size=4)}, {}, {"dino_local"}),
    ],
)
def test_what_does_not_count_is_left_out(changes, batch, absent) -> None:
    training = Training(**changes)
    for step in range(2):
        report = training.step(step, **batch)
        assert report.finite
        assert {"dino_global", "dino_local", "ibot", "koleo", "total"} - report.losses.keys() == absent
    if batch.get("masked") == 0.0:
        assert report.losses["ibot"] == 0


def test_the_total_is_the_weighted_sum() -> None:
    losses = LossConfig(
        dino_weight=0.7,
        local_weight=constant(0.5),
        ibot_weight=1.3,
        koleo_weight=0.2,
        koleo_group_size=4,
        gram=GramConfig(weight=constant(3.0)),
    )
    found = Training(losses=losses).step(0).losses
    weights = {"dino_global": 0.7, "dino_local": 0.35, "ibot": 1.3, "koleo": 0.2, "gram": 3.0}
    assert found["total"] == pytest.approx(sum(weights[name] * found[name] for name in weights), rel=1e-5)


def test_bfloat16_is_near_and_weights_stay_float32() -> None:
    exact, rounded = Training(), Training()
    for step in range(3):
        one, other = exact.step(step), rounded.step(step, precision="bf16")
        assert other.finite
        assert one.losses == pytest.approx(other.losses, rel=0.05)
    assert {parameter.dtype for parameter in rounded.state.parameters()} == {torch.float32}
    assert other.features["student_cls"].dtype == torch.float32


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 300), st.integers(0, 40), st.integers(1, 60), st.one_of(st.none(), st.integers(1, 5)))
def test_refreshments_are_those_of_the_rule(step: int, first: int, every: int, most: int | None) -> None:
    from densedino.pretrain.gram import is_refresh_due

    gram = GramConfig(first_update=first, update_every=every, max_updates=most)
    due = list(range(first, 301, every))[:most]
    assert is_refresh_due(gram, step) == (step in due)
    assert is_refresh_due(replace(gram, update_every=None, max_updates=None), step) == (step == first)


def test_values_come_from_the_stages_own_step() -> None:
    optimizer = OptimizerConfig(
        lr=StagedSchedule(start=0.0, peak=1e-3, end=1e-3, warmup_steps=10), last_layer_freeze_steps=5
    )
    stage = replace(Training().stage, batch_size=256, optimizer=optimizer)
    assert step_values(stage, 5).lr == pytest.approx(1e-3)  # half of the warm-up, times 4·√(256/1024)
    assert step_values(stage, 4).last_layer_lr == 0
    assert step_values(stage, 5).last_layer_lr == step_values(stage, 5).lr


def test_batches_and_states_that_do_not_fit_are_refused() -> None:
    training = Training()
    batch = training.batch(0)
    with pytest.raises(InputError, match="Stack them alike"):
        replace(batch, sample_ids=("only one",))
    with pytest.raises(InputError, match="Stack them alike"):
        replace(batch, masks=batch.masks[:1])
    training.stage = replace(training.stage, losses=LossConfig(gram=GramConfig()))
    with pytest.raises(InputError, match="begin_stage"):
        training.step(0)


def test_splitting_keeps_everything() -> None:
    batch = Training().batch(0)
    parts = batch.split(3)
    assert [len(part) for part in parts] == [3, 3, 2]
    assert [part.places for part in parts] == [range(3), range(3, 6), range(6, 8)]
    assert torch.equal(joined(parts).crops.local_crops, batch.crops.local_crops)
    assert torch.equal(joined(parts).masks, batch.masks)
    assert batch.split(None)[0].sample_ids == batch.sample_ids
    assert batch.to("cpu").crops.global_crops is batch.crops.global_crops


def test_the_example_runs() -> None:
    given_names = {**globals(), "recipe": recipe, "Crops": Crops}
    example = doctest.DocTestParser().get_doctest(train_step.__doc__, given_names, "train_step", None, 0)
    result = doctest.DocTestRunner(verbose=False).run(example)
    assert result.attempted == 8
    assert result.failed == 0
