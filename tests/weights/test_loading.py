from __future__ import annotations

import hashlib
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from densedino.errors import InputError, StateDictError, UnknownNameError, WeightsNotFoundError
from densedino.models.catalog import MODELS, create_model
from densedino.weights import files, fitting, loading
from densedino.weights.catalog import IMAGENET_STATS, SAT493M_STATS, WEIGHTS
from densedino.weights.dialects import DIALECTS, from_meta
from densedino.weights.loading import load_stored, load_weights
from densedino.weights.sources import cached, sample_sha256

SMALL = ["debug_vit", "debug_vit_swiglu", "debug_convnext"]


def assert_same(model, state, *, but=()):
    got = model.state_dict()
    wanted = {
        k: v
        for k, v in state.items()
        if not k.endswith((".periods", ".bias_mask")) and not k.startswith(("norms", *but))
    }
    assert all(torch.equal(got[key], value) for key, value in wanted.items())


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("name", SMALL)
def test_every_dialect_loads_to_the_same_tensors(released, tmp_path, name, dialect):
    state = released(name)
    tensors = from_meta({k: v for k, v in state.items() if "norms" not in k}, dialect)
    if dialect == "meta":
        torch.save(tensors, tmp_path / "x.pth")
    else:
        save_file(tensors, tmp_path / "x.pth")
    model, card = load_weights(weights=tmp_path / "x.pth")
    assert_same(
        model,
        state,
        but={"timm": ("mask_token", "local_cls_norm"), "huggingface": ("local_cls_norm",)}.get(dialect, ()),
    )
    assert not model.training and card.model == name and card.in_chans == 3
    assert card.dialect == ("meta" if dialect == "densedino" else dialect)  # without our metadata the names are Meta's
    assert card.sha256 == hashlib.sha256((tmp_path / "x.pth").read_bytes()).hexdigest()


def test_a_training_checkpoint_loads(released, tmp_path):
    teacher = {f"module.backbone.{key}": value for key, value in released("debug_vit").items()}
    torch.save({"teacher": teacher, "iteration": 3}, tmp_path / "x.pth")
    model, card = load_weights("debug_vit", weights=str(tmp_path / "x.pth"))
    assert_same(model, released("debug_vit"))
    assert ("iteration", "not weights") in card.dropped


def test_features_do_not_see_the_rounding_of_periods(released):
    state = released("debug_vit")
    exact = {**state, "rope_embed.periods": create_model("debug_vit").rope_embed.periods}
    x = torch.randn(1, 3, 32, 48)
    with torch.no_grad():
        one, other = (load_weights(weights=w)[0].forward_features(x)["x_prenorm"] for w in (state, exact))
    assert torch.equal(one, other)


def test_a_mapping_is_copied_and_known_by_its_tensors(released):
    state = released("debug_vit")
    model, card = load_weights(weights=state)
    state["cls_token"].zero_()
    assert model.cls_token.count_nonzero() and card.source == "mapping"
    assert card.sha256 == load_weights(weights=released("debug_vit"))[1].sha256
    assert card.sha256 != load_weights(weights=released("debug_vit", seed=1))[1].sha256


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_type_of_the_file_is_kept_unless_another_is_asked_for(released, dtype):
    assert load_weights(weights=released("debug_vit", dtype=dtype))[0].cls_token.dtype == dtype
    assert load_weights(weights=released("debug_vit"), dtype=dtype)[0].cls_token.dtype == dtype


def test_mixed_types_become_the_widest(released):
    state = released("debug_vit", dtype=torch.bfloat16)
    state["norm.weight"] = state["norm.weight"].float()
    model, card = load_weights(weights=state)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert "several types, all cast to float32" in card.notes[-1]


def test_other_channels_load(released):
    model, card = load_weights(weights=released("debug_vit", in_chans=12))
    assert model.in_chans == card.in_chans == len(card.mean) == 12


def test_asking_for_another_architecture_names_both(released):
    with pytest.raises(StateDictError, match="'vits16' was asked for, but mapping holds debug_vit"):
        load_weights("vits16", weights=released("debug_vit"))


def test_a_sat_file_is_told_by_the_tensors_only_it_has(released, tmp_path, monkeypatch):
    spec = MODELS["debug_vit"]
    monkeypatch.setitem(MODELS, "vitl16", spec.__class__(**{**spec.__dict__, "name": "vitl16", "hidden_dim": 96}))
    model, card = load_weights(weights=released("vitl16", sat=True))
    assert (card.name, card.mean) == ("vitl16-sat493m", SAT493M_STATS[0])
    assert ("local_cls_norm.*", "used in training only") in card.dropped and model.local_cls_norm is None
    with pytest.raises(StateDictError, match="LVD-1689M"):
        load_weights("vitl16-lvd1689m", weights=released("vitl16", sat=True))


def test_random_weights_are_equal_everywhere_and_leave_the_generator_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, card = load_weights("debug_vit", weights="random")
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    other, _ = load_weights("debug_vit", weights="random")
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert card.untrained and card.source == "random" and card.dropped == () and "untrained" in card.notes[0]
    assert card.sha256 == hashlib.sha256(b"densedino:debug_vit").hexdigest()
    # drawn on x86 with AVX2; other instruction sets may differ in the last bit
    assert one.cls_token.flatten()[:2].tolist() == pytest.approx([-0.0166519, -0.0186547], abs=1e-6)


def test_random_weights_of_two_names_differ():
    tokens = [load_weights(name, weights="random")[0].cls_token for name in ("debug_vit", "debug_vit_swiglu")]
    assert not torch.equal(*tokens)


def test_random_weights_have_the_statistics_of_the_name():
    assert load_weights("vitt16", weights="random")[1].mean == IMAGENET_STATS[0]


@pytest.mark.parametrize("name", [None, "vitt16"])
def test_the_default_is_vitt16(name):
    model, card = load_weights(name)
    assert card.name == "vitt16" and model.spec is MODELS["vitt16"]
    assert card.untrained == (loading._embedded() is None)


def test_embedded_weights_take_the_place_of_random_ones(released, tmp_path, monkeypatch):
    path = tmp_path / "vitt16.safetensors"
    save_file(from_meta(released("vitt16"), "densedino"), path)
    monkeypatch.setattr(loading, "_embedded", lambda: path)
    model, card = load_weights()
    assert_same(model, released("vitt16"))
    assert card.source == "embedded" and not card.untrained


def test_weights_that_are_not_here_list_every_way_to_get_them():
    with pytest.raises(WeightsNotFoundError) as caught:
        load_weights("vitl16-sat493m")
    record = WEIGHTS["vitl16-sat493m"]
    assert all(
        part in str(caught.value) for part in ("https://ai.meta.com", record.file, record.timm, record.huggingface)
    )
    with pytest.raises(WeightsNotFoundError, match="weights='random'"):
        load_weights("debug_vit")


def test_weights_in_the_cache_are_found_by_name(released, tmp_path, cache, monkeypatch):
    torch.save(released("debug_vit"), tmp_path / "x.pth")
    content = (tmp_path / "x.pth").read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    record = WEIGHTS["vits16-lvd1689m"]
    fake = record.__class__(
        **{**record.__dict__, "name": "debug_vit-lvd1689m", "model": "debug_vit", "sha256": digest[:8]}
    )
    monkeypatch.setitem(WEIGHTS, "debug_vit-lvd1689m", fake)
    home = cache / "weights" / digest / "x.pth"
    home.parent.mkdir(parents=True)
    home.write_bytes(content)
    for name in ("debug_vit", "debug_vit-lvd1689m"):
        _, card = load_weights(name)
        assert (card.name, card.source) == ("debug_vit-lvd1689m", str(home))


def test_a_url_loads_and_its_secret_stays_secret(released, site, tmp_path, capsys):
    torch.save(released("debug_vit"), tmp_path / "x.pth")
    site.content = (tmp_path / "x.pth").read_bytes()
    digest = hashlib.sha256(site.content).hexdigest()
    model, card = load_weights(weights=f"{site.url}/teacher-{digest[:8]}.pth?Signature=SECRET")
    assert_same(model, released("debug_vit"))
    assert card.source == f"{site.url}/teacher-{digest[:8]}.pth" and card.sha256 == digest and cached(digest)
    assert "SECRET" not in "".join(capsys.readouterr()) + repr(card)


def test_a_local_folder_named_like_a_repository_wins(released, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "timm" / "mine").mkdir(parents=True)
    save_file(from_meta(released("debug_vit"), "timm"), "timm/mine/model.safetensors")
    assert load_weights(weights="timm/mine")[1].source == "timm/mine"


def test_the_licence_is_shown_once(released, tmp_path, capsys):
    torch.save(released("vitt16"), tmp_path / "vitt16_lvd1689m.pth")
    torch.save(released("vits16"), tmp_path / "vits16_lvd1689m.pth")
    said = []
    for name in ("vits16", "vits16", "vitt16"):
        load_weights(weights=tmp_path / f"{name}_lvd1689m.pth")
        said.append(capsys.readouterr().err)
    assert "vits16-lvd1689m is under the DINOv3 License: https://ai.meta.com" in said[0]
    assert said[1:] == ["", ""]  # seen; and nobody knows whose the other ones are


@pytest.mark.parametrize(
    ("name", "weights", "error", "words"),
    [
        ("vits17", None, UnknownNameError, "did you mean 'vits16'"),
        (None, 5, InputError, "weights is a int; valid are"),
        (None, "no/such/file.pth", WeightsNotFoundError, "no file or folder"),
        (None, "http://example.com/x.pth", InputError, "https"),
    ],
)
def test_what_cannot_be_used_is_an_error(name, weights, error, words):
    with pytest.raises(error, match=words):
        load_weights(name, weights=weights)


@pytest.mark.slow
def test_random_weights_are_equal_in_another_process():
    code = (
        "from densedino.weights.loading import load_weights\n"
        "print(load_weights('vits16', weights='random')[0].blocks[7].mlp.fc1.weight.double().sum().item())"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout for _ in "ab"
    ]
    here = load_weights("vits16", weights="random")[0].blocks[7].mlp.fc1.weight.double().sum().item()
    assert {float(out) for out in runs} == {here}


def test_of_a_large_file_only_small_tensors_are_read(released, tmp_path, monkeypatch):
    """Neither hash nor a search for NaN goes through it; a thorough reading does both."""
    monkeypatch.setattr(files, "LARGE", 1000)
    monkeypatch.setattr(fitting, "_SMALL", 1000)
    state = released("debug_vit")
    state["blocks.1.mlp.fc2.weight"][3, 3] = float("nan")
    save_file(state, tmp_path / "x.safetensors")
    model, card = load_weights(weights=tmp_path / "x.safetensors")
    assert model.blocks[1].mlp.fc2.weight.isnan().any()
    assert card.sha256 == sample_sha256(tmp_path / "x.safetensors") and "not verified" in card.notes[-1]
    with pytest.raises(StateDictError, match="NaN"):
        loading.read_weights(None, weights=tmp_path / "x.safetensors")
    state["norm.weight"][0] = float("nan")
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(StateDictError, match=r"NaN or infinity in norm\.weight"):
        load_weights(weights=tmp_path / "x.safetensors")


def test_a_large_file_in_the_cache_was_hashed_when_it_came(released, tmp_path, monkeypatch, cache):
    monkeypatch.setattr(files, "LARGE", 1000)
    save_file(released("debug_vit"), tmp_path / "x")
    sha256 = hashlib.sha256((tmp_path / "x").read_bytes()).hexdigest()
    path = cache / "weights" / sha256 / "x.safetensors"
    path.parent.mkdir(parents=True)
    (tmp_path / "x").rename(path)
    _, card = load_weights(weights=path)
    assert card.sha256 == sha256 and not any("not verified" in note for note in card.notes)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_stored_tensors_are_those_that_are_loaded(released, tmp_path, dialect):
    state = from_meta(released("debug_vit"), dialect)
    save_file(state, tmp_path / "x.safetensors")
    stored = load_stored(weights=tmp_path / "x.safetensors")
    model, card = load_weights(weights=tmp_path / "x.safetensors")
    assert stored.card == card
    for key, value in model.state_dict().items():
        out = torch.empty_like(value)
        stored.tensors[key].read(out)
        assert torch.equal(out, value)
    joined = stored.model.blocks[0].attn.qkv.weight
    assert joined.is_meta == (dialect == "huggingface")  # there in three parts, which joining would read
