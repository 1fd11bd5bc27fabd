from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open

from densedino.errors import InputError, StateDictError
from densedino.models.catalog import create_model
from densedino.weights import convert as convert_module
from densedino.weights.card import WeightsCard
from densedino.weights.convert import convert, write_weights
from densedino.weights.dialects import DIALECTS
from densedino.weights.loading import load_weights

SMALL = ["debug_vit", "debug_vit_swiglu", "debug_convnext"]
NAMES = {"meta": "x.pth", "huggingface": "folder", "timm": "timm.safetensors", "densedino": "x.safetensors"}


def bits(state):
    return {
        key: (value.dtype, value.shape, value.contiguous().flatten().view(torch.uint8).tolist())
        for key, value in state.items()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("middle", DIALECTS)
@pytest.mark.parametrize("name", SMALL)
def test_through_every_dialect_and_back_is_bit_equal(released, tmp_path, name, middle, dtype):
    state = released(name, dtype=dtype, key_bias=True, sat=name == "debug_vit")
    torch.save(state, tmp_path / "original.pth")
    there = convert(
        tmp_path / "original.pth", tmp_path / NAMES[middle] if middle != "meta" else tmp_path / "m.pth", to=middle
    )
    back = convert(there.path, tmp_path / "back.pth", to="meta")
    assert bits(torch.load(back.path, weights_only=True)) == bits(state)
    assert there.fingerprint == back.fingerprint


@pytest.mark.parametrize("name", SMALL)
def test_a_walk_through_all_dialects_keeps_the_fingerprint(released, tmp_path, name):
    source, prints = released(name), set()
    for number, to in enumerate(("timm", "huggingface", "meta", "densedino", "huggingface", "timm", "densedino")):
        done = convert(source, tmp_path / f"{number}{NAMES[to]}", to=to)
        source, prints = done.path, prints | {done.fingerprint}
        assert load_weights(weights=source)[1].dialect == to
    assert len(prints) == 1


@pytest.mark.parametrize("to", DIALECTS)
def test_identity_licence_and_origin_travel_along(released, tmp_path, to):
    torch.save(released("vits16"), tmp_path / "vits16_lvd1689m.pth")
    _, original = load_weights(weights=tmp_path / "vits16_lvd1689m.pth")
    done = convert(tmp_path / "vits16_lvd1689m.pth", tmp_path / NAMES[to], to=to)
    _, card = load_weights(weights=done.path)
    keys = ("name", "model", "mean", "std", "licence", "licence_url", "data", "untrained")
    assert [getattr(card, key) for key in keys] == [getattr(original, key) for key in keys]
    assert original.sha256 in card.notes[-1]
    if to != "meta":
        file = done.path / "model.safetensors" if to == "huggingface" else done.path
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata()
        assert metadata["densedino.fingerprint"] == done.fingerprint
        assert metadata["licence"].startswith("DINOv3 License https://")
    if to == "huggingface":
        readme = (done.path / "README.md").read_text()
        assert all(
            part in readme for part in (original.licence_url, original.sha256, done.fingerprint, "dinov3-license")
        )


@pytest.mark.parametrize("to", DIALECTS)
def test_untrained_stays_untrained(tmp_path, to):
    done = convert("random", tmp_path / NAMES[to], to=to, name="debug_vit")
    assert done.card.untrained and load_weights(weights=done.path)[1].untrained


def test_a_sat_file_keeps_its_statistics_in_a_meta_file(released, tmp_path):
    done = convert(released("vits16"), tmp_path / "plain.pth", to="meta")
    assert load_weights(weights=done.path)[1].data == "unknown"
    metadata = torch.load(done.path, weights_only=True).densedino_metadata
    assert json.loads(metadata["densedino.card"])["mean"] == [0.485, 0.456, 0.406]


def test_a_meta_file_holds_what_the_release_holds_and_no_more(released, tmp_path):
    view = {key: torch.stack([value, value])[1] for key, value in released("debug_convnext").items()}
    done = convert(view, tmp_path / "x.pth", to="meta")
    state = torch.load(done.path, weights_only=True)
    assert state.keys() == released("debug_convnext").keys()
    assert all(value.untyped_storage().nbytes() == value.nbytes for value in state.values())


def test_what_was_dropped_and_carried_is_reported(released, tmp_path):
    state = released("debug_vit") | {"head.weight": torch.ones(2, 2)}
    done = convert(state, tmp_path / "x.safetensors", to="timm")
    assert done.dropped == (("head.*", "a head, not the backbone"),)
    assert done.kept == ("mask_token", "rope_embed.periods")
    assert done.timm_name is None


@pytest.mark.parametrize(
    ("to", "name", "words"),
    [
        ("lightly", "x.pth", "unknown dialect 'lightly'"),
        ("timm", "x.pth", r"written to a \.safetensors file"),
        ("densedino", "x", r"written to a \.safetensors file"),
        ("meta", "there.pth", "exists, and nothing is overwritten"),
        ("huggingface", "folder", "exists, and nothing is overwritten"),
    ],
)
def test_targets_that_cannot_be_written_are_errors(released, tmp_path, to, name, words):
    (tmp_path / "there.pth").write_text("mine")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=words):
        convert(released("debug_vit"), tmp_path / name, to=to)
    assert (tmp_path / "there.pth").read_text() == "mine"


@pytest.mark.parametrize("to", ["huggingface", "densedino"])
def test_a_failure_leaves_nothing_behind(released, tmp_path, monkeypatch, to):
    def fail(*args, **options):
        raise OSError("disk full")

    monkeypatch.setattr(convert_module, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        convert(released("debug_vit"), tmp_path / "out" / NAMES[to], to=to)
    assert list((tmp_path / "out").iterdir()) == []


def tokens(model, x):
    with torch.no_grad():
        out = model.forward_features(x)
    return torch.cat([out["x_norm_clstoken"][:, None], out["x_storage_tokens"], out["x_norm_patchtokens"]], dim=1)


@pytest.mark.parametrize("name", [*SMALL, "vitt16"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_transformers_opens_the_folder_as_it_is(released, tmp_path, name):
    import transformers

    state = released(name)
    done = convert(state, tmp_path / "folder", to="huggingface")
    oracle, info = transformers.AutoModel.from_pretrained(done.path, output_loading_info=True)
    assert not any(info.values()), info
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        theirs = oracle.eval()(x).last_hidden_state
    assert (theirs - tokens(load_weights(weights=done.path)[0], x)).abs().max() <= 1e-5
    processor = transformers.AutoImageProcessor.from_pretrained(done.path)
    assert list(processor.image_mean) == list(done.card.mean) and processor.size == {"height": 224, "width": 224}
    assert processor.resample == 2 and processor.rescale_factor == 1 / 255


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "zero_bias", "timm_name"),
    [
        ("vits16", True, "vit_small_patch16_dinov3.lvd1689m"),
        ("vits16", False, "vit_small_patch16_dinov3_qkvb.lvd1689m"),
        ("vits16plus", False, "vit_small_plus_patch16_dinov3_qkvb.lvd1689m"),
        ("vitt16", True, "vit_tiny_patch16_dinov3_qkvb"),
        ("convnext_tiny", False, "convnext_tiny.dinov3_lvd1689m"),
    ],
)
def test_timm_opens_the_file_under_the_name_that_is_said(released, tmp_path, name, zero_bias, timm_name):
    import timm

    done = convert(released(name, zero_bias=zero_bias), tmp_path / "x.safetensors", to="timm")
    assert done.timm_name == timm_name
    with safe_open(done.path, framework="pt") as opened:
        assert opened.metadata()["timm"] == timm_name
    options = {} if name.startswith("convnext") else {"dynamic_img_size": True}
    oracle = timm.create_model(timm_name, checkpoint_path=str(done.path), **options).eval()
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        theirs = oracle.forward_features(x)
        if name.startswith("convnext"):
            theirs = oracle.head.norm(theirs).flatten(2).transpose(1, 2)
    ours = tokens(load_weights(weights=done.path)[0], x)[:, -theirs.shape[1] :]
    assert (theirs - ours).abs().max() <= 1e-5


def test_transformers_own_folder_is_read(tmp_path):
    import transformers

    config = transformers.DINOv3ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_register_tokens=4
    )
    oracle = transformers.DINOv3ViTModel(config).eval()
    oracle.save_pretrained(tmp_path / "saved", max_shard_size="20KB")
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        theirs = oracle(x).last_hidden_state
    for weights in (
        tmp_path / "saved",
        oracle.state_dict(),
        {f"backbone.{k}": v for k, v in oracle.state_dict().items()},
    ):
        assert (theirs - tokens(load_weights(weights=weights)[0], x)).abs().max() <= 1e-5


def test_new_weights_are_written_with_their_card_and_read_back(tmp_path):
    model = create_model("debug_vit", in_chans=5, device="cpu")
    card = WeightsCard(
        name="mine", model="debug_vit", source="trained", sha256="", mean=(0.5,) * 5, std=(0.25,) * 5, in_chans=5,
        licence="MIT", licence_url="", data="photos", dialect="densedino", untrained=False, notes=("a note",),
    )  # fmt: skip
    write_weights(model.state_dict(), tmp_path / "model.safetensors", card=card)
    write_weights(model.state_dict(), tmp_path / "model.safetensors", card=card)  # replaces
    loaded, its_card = load_weights(weights=tmp_path / "model.safetensors")
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    same = ("name", "model", "mean", "std", "in_chans", "licence", "data", "dialect", "untrained", "notes")
    assert {key: getattr(its_card, key) for key in same} == {key: getattr(card, key) for key in same}
    with torch.no_grad():
        model.norm.bias[0] = torch.nan
    with pytest.raises(StateDictError, match="norm"):
        write_weights(model.state_dict(), tmp_path / "other.safetensors", card=card)
    assert not (tmp_path / "other.safetensors").exists()
