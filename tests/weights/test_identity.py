from __future__ import annotations

import json
from dataclasses import replace

import pytest

from densedino.errors import StateDictError, UnknownNameError
from densedino.models.catalog import create_model
from densedino.weights.catalog import IMAGENET_STATS, SAT493M_STATS, WEIGHTS
from densedino.weights.dialects import Translation
from densedino.weights.files import Checkpoint
from densedino.weights.fitting import Fitted, infer_spec
from densedino.weights.identity import CARD_KEY, Request, identify

IMAGENET = {"image_mean": list(IMAGENET_STATS[0]), "image_std": list(IMAGENET_STATS[1])}
SAT = {"image_mean": list(SAT493M_STATS[0]), "image_std": list(SAT493M_STATS[1])}
HF = {"model_type": "dinov3_vit"}


@pytest.fixture(scope="module")
def shapes():
    return {name: create_model(name, device="meta").state_dict() for name in ("vits16", "vitl16", "vitt16")}


@pytest.fixture
def card(shapes):
    """A function that identifies a checkpoint whose tensors fit, from all that speaks for its origin."""

    def make(model="vitl16", name=None, *, dialect="huggingface", extra=(), in_chans=3, **about):
        tensors = {**shapes[model], **dict.fromkeys(extra)}
        spec, _ = infer_spec(shapes[model])
        translation = Translation(tensors, dialect, (), ())
        fitted = Fitted(spec, in_chans, translation.dialect, tensors, (), (), ())
        checkpoint = Checkpoint({}, **{"source": "somewhere", "sha256": "f" * 64, **about})
        return identify(checkpoint, fitted, Request.parse(name))

    return make


@pytest.mark.parametrize("record", WEIGHTS.values(), ids=list(WEIGHTS))
def test_a_released_file_is_known_by_its_content_alone(record):
    tensors = create_model(record.model, device="meta").state_dict()
    fitted = Fitted(infer_spec(tensors)[0], 3, "meta", tensors, (), (), ())
    checkpoint = Checkpoint({}, source="renamed (1).pth", sha256=record.sha256 + "0" * 56)
    card = identify(checkpoint, fitted, Request.parse(None))
    assert (card.name, card.mean, card.std, card.data) == (record.name, record.mean, record.std, record.data)
    assert (card.licence, card.licence_url) == (record.licence, record.licence_url)
    assert card.notes == () and not card.untrained


def test_content_contradicting_the_name_asked_for_is_an_error(card):
    with pytest.raises(StateDictError, match="'vitl16-lvd1689m' was asked for, but somewhere is vitl16-sat493m"):
        card(name="vitl16-lvd1689m", sha256="eadcf0ff" + "0" * 56)
    assert card(name="vitl16", sha256="eadcf0ff" + "0" * 56).name == "vitl16-sat493m"


def test_another_architecture_names_both(card):
    with pytest.raises(StateDictError, match="'vits16-lvd1689m' was asked for, but somewhere holds vitl16"):
        card(name="vits16-lvd1689m")


@pytest.mark.parametrize(
    "repository", ["facebook/dinov3-vitl16-pretrain-sat493m", "timm/vit_large_patch16_dinov3_qkvb.sat493m"]
)
def test_the_official_repository_outweighs_its_preprocessor(card, repository):
    got = card(source=f"hf:{repository}", config=HF, preprocessor=IMAGENET)  # as it was at the release
    assert (got.name, got.mean) == ("vitl16-sat493m", SAT493M_STATS[0])


def test_a_folder_of_the_hubs_cache_is_its_repository(card):
    folder = "/home/me/.cache/huggingface/hub/models--facebook--dinov3-vitl16-pretrain-sat493m/snapshots/abc"
    assert card(source=folder, config=HF, preprocessor=IMAGENET).name == "vitl16-sat493m"


def test_a_released_name_over_other_content_is_said(card):
    got = card("vits16", dialect="meta", file_name="dinov3_vits16_pretrain_lvd1689m-08c60483.pth")
    assert got.notes[0].startswith("named like the released dinov3_vits16")


@pytest.mark.parametrize(
    ("about", "name", "data"),
    [
        ({"config": HF, "preprocessor": SAT}, None, "SAT-493M"),
        ({"config": HF, "preprocessor": IMAGENET}, None, "LVD-1689M"),
        ({"config": {**HF, "_name_or_path": "facebook/dinov3-vitl16-pretrain-sat493m"}}, None, "SAT-493M"),
        ({"source": "/data/dinov3-vitl16-pretrain-sat493m"}, None, "SAT-493M"),
        ({"file_name": "DINOv3_ViTL16_SAT493M.safetensors"}, None, "SAT-493M"),
        ({"extra": ("local_cls_norm.weight",)}, None, "SAT-493M"),
        ({}, "vitl16-sat493m", "SAT-493M"),
        ({}, "vitl16-lvd1689m", "LVD-1689M"),
    ],
)
def test_what_speaks_for_unknown_content_is_heard(card, about, name, data):
    got = card(name=name, **about)
    assert (got.data, got.mean) == (data, (SAT493M_STATS if data == "SAT-493M" else IMAGENET_STATS)[0])
    assert got.licence == "DINOv3 License" and "taken for" in got.notes[0]


@pytest.mark.parametrize(
    ("about", "name"),
    [
        ({"extra": ("local_cls_norm.weight",)}, "vitl16-lvd1689m"),
        ({"config": HF, "preprocessor": IMAGENET}, "vitl16-sat493m"),
        ({"config": HF, "preprocessor": SAT}, "vitl16-lvd1689m"),
        ({"file_name": "x_sat493m.pth"}, "vitl16-lvd1689m"),
        ({"file_name": "x_sat493m.pth", "config": HF, "preprocessor": IMAGENET}, None),
    ],
)
def test_voices_that_disagree_are_an_error_naming_both(card, about, name):
    with pytest.raises(
        StateDictError, match=r"says (LVD-1689M|SAT-493M), .* says (LVD-1689M|SAT-493M).*Correct or remove"
    ):
        card(name=name, **about)


def test_silence_is_noted(card):
    got = card("vitt16", dialect="meta")
    assert (got.name, got.data, got.licence, got.mean) == ("vitt16", "unknown", "unknown", IMAGENET_STATS[0])
    assert "assumed" in got.notes[0]


def test_own_statistics_are_taken_as_they_are(card):
    got = card("vits16", config=HF, preprocessor={"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1]})
    assert (got.mean, got.std, got.name) == ((0.1, 0.2, 0.3), (1.0, 1.0, 1.0), "vits16")


def test_other_channels_have_no_known_statistics(card):
    got = card("vits16", in_chans=5, dialect="meta")
    assert got.mean == (0.0,) * 5 and got.std == (1.0,) * 5 and "5 channels" in got.notes[-1]


def test_files_beside_a_meta_checkpoint_are_not_its_own(card):
    assert card(dialect="meta", config=HF, preprocessor=SAT).mean == IMAGENET_STATS[0]


def test_timm_says_data_and_licence(card):
    timm = {
        "architecture": "x",
        "pretrained_cfg": {"tag": "eupe_lvd1689m", "license": "fair-noncommercial-research-license"},
    }
    got = card("vits16", dialect="timm", config=timm, source="hf:timm/vit_small_patch16_dinov3_qkvb.eupe_lvd1689m")
    assert (got.name, got.data, got.licence) == ("vits16", "eupe_lvd1689m", "fair-noncommercial-research-license")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_attention_heads": 8}, "num_attention_heads 8 instead of 16"),
        ({"rope_theta": 10_000.0}, "rope_theta 10000.0 instead of 100.0"),
        ({"layer_norm_eps": 1e-6}, "layer_norm_eps"),
        ({"hidden_act": "silu"}, "hidden_act silu instead of gelu"),
    ],
)
def test_a_configuration_of_other_arithmetic_is_an_error(card, change, words):
    with pytest.raises(StateDictError, match=words):
        card(config={**HF, **change})


def test_our_own_card_in_the_file_is_believed(card):
    written = replace(card(name="vitl16-sat493m"), dialect="densedino", notes=("a note",))
    metadata = {CARD_KEY: json.dumps(written.to_dict())}
    got = card(dialect="meta", metadata=metadata, source="x.safetensors", sha256="e" * 64)
    assert got == replace(written, source="x.safetensors", sha256="e" * 64)
    assert card(name="vitl16-sat493m", metadata=metadata).name == "vitl16-sat493m"
    with pytest.raises(StateDictError, match="says of itself that it is vitl16-sat493m"):
        card(name="vitl16-lvd1689m", metadata=metadata)


def test_a_card_of_other_tensors_or_unreadable_is_an_error(card):
    metadata = {CARD_KEY: json.dumps(card(name="vitl16-sat493m").to_dict())}
    with pytest.raises(StateDictError, match="changed after it was written"):
        card("vits16", metadata=metadata)
    for text in ("{", "{}", "[1]", '{"name": 1}'):
        with pytest.raises(StateDictError, match="cannot be read"):
            card(metadata={CARD_KEY: text})


def test_request_knows_both_tables():
    assert Request.parse("vits16").record is None
    assert Request.parse("vits16-lvd1689m").model == "vits16"
    assert Request.parse(None) == Request()
    with pytest.raises(UnknownNameError, match="did you mean 'vits16'"):
        Request.parse("vits-16")
