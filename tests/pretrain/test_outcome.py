from __future__ import annotations

from dataclasses import replace

import pytest
from safetensors import safe_open

from densedino.errors import InputError, WeightsNotFoundError
from densedino.models.catalog import create_model, model_spec
from densedino.pretrain.outcome import OWN_LICENCE, check_starts, is_loadable, origin_of, outcome_card, write_outcome
from densedino.pretrain.settings import GramConfig
from densedino.recipes import recipe
from densedino.weights.loading import load_weights

PICTURES = (("photos", 1234),)


def test_the_card_says_what_is_known():
    run = recipe("debug")
    card = outcome_card(run, pictures=PICTURES, origin=None)
    crops = run.stages[-1].resolutions[0].crops
    assert (card.model, card.mean, card.std, card.in_chans) == ("debug_vit", crops.mean, crops.std, 3)
    assert (card.data, card.licence, card.untrained) == ("photos (1,234 pictures)", OWN_LICENCE, False)
    assert "pretrain (40 steps of 16), gram (20 steps of 16)" in card.notes[0]


def test_weights_that_a_run_started_from_hand_on_their_licence():
    origin = replace(
        outcome_card(recipe("debug"), pictures=PICTURES, origin=None),
        licence="DINOv3 License", licence_url="https://x", data="LVD-1689M", name="vits16-lvd1689m", sha256="abc",
    )  # fmt: skip
    card = outcome_card(recipe("debug"), pictures=PICTURES, origin=origin)
    assert (card.licence, card.licence_url) == ("DINOv3 License", "https://x")
    assert card.data == "photos (1,234 pictures); before that, LVD-1689M"
    assert "started from vits16-lvd1689m, densedino pretrain, SHA-256 abc" in card.notes[1]


def test_it_is_written_and_loads(tmp_path):
    run = recipe("debug")
    backbone = create_model("debug_vit", device="cpu")
    path = write_outcome(backbone, tmp_path / "model.safetensors", config=run, pictures=PICTURES, origin=None)
    model, card = load_weights(weights=path)
    assert card.data == "photos (1,234 pictures)"
    for name, value in backbone.state_dict().items():
        assert model.state_dict()[name].equal(value), name


def test_an_architecture_of_ones_own_is_written_as_it_is(tmp_path):
    run = replace(recipe("debug"), model=replace(model_spec("debug_vit"), name="mine", num_register_tokens=0))
    assert is_loadable(recipe("debug"))
    assert not is_loadable(run)
    backbone = create_model(run.spec, device="cpu")
    path = write_outcome(backbone, tmp_path / "model.safetensors", config=run, pictures=PICTURES, origin=None)
    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == backbone.state_dict().keys()


def test_where_a_stage_starts_from(tmp_path):
    assert origin_of("random") is None
    assert origin_of("previous") is None
    path = tmp_path / "model.safetensors"
    write_outcome(create_model("debug_vit", device="cpu"), path, config=recipe("debug"), pictures=PICTURES, origin=None)
    card = origin_of(str(path))
    assert card is not None
    assert card.model == "debug_vit"
    with pytest.raises(WeightsNotFoundError, match="no_such"):
        origin_of("no_such.pth")


def test_weights_of_all_stages_are_looked_at_beforehand(tmp_path):
    path = tmp_path / "model.safetensors"
    run = recipe("debug")
    write_outcome(create_model("debug_vit", device="cpu"), path, config=run, pictures=PICTURES, origin=None)
    check_starts(run)
    check_starts(replace(run, stages=(*run.stages[:2], replace(run.stages[2], start=str(path)))))
    gram = replace(run.stages[2].losses, gram=GramConfig(checkpoint="missing.pth"))
    with pytest.raises(WeightsNotFoundError, match="missing"):
        check_starts(replace(run, stages=(*run.stages[:2], replace(run.stages[2], losses=gram))))
    with pytest.raises(InputError, match="holds a debug_vit, but the run trains a vitt16"):
        check_starts(replace(run, model="vitt16", stages=(replace(run.stages[0], start=str(path)),)))
