from __future__ import annotations

import pytest
import torch

import densedino as dd
from densedino.engines.eager import EagerEngine
from densedino.engines.placed import PlacedEngine, device_map_of
from densedino.errors import InputError
from densedino.models.catalog import create_model

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:accelerate", "ignore::UserWarning:accelerate")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["debug_vit", "debug_vit_swiglu"])
def test_blocks_on_cpu_and_disk_give_the_same(tmp_path, name, precision):
    torch.manual_seed(0)
    model = create_model(name)
    x = torch.randn(2, 3, 48, 32)
    wanted = EagerEngine(create_like(model), device=CPU, precision=precision)(x, layers=(-1, 0))
    places = {"blocks.0": "cpu", "blocks.1": "disk"}
    engine = PlacedEngine(model, devices=places, precision=precision, offload=tmp_path)
    got = engine(x, layers=(-1, 0))
    for one, other in zip(got, wanted, strict=True):
        for field in ("patches", "cls", "registers"):  # the fused GELU is not for layers that accelerate watches
            difference = getattr(one, field) - getattr(other, field)
            assert difference.abs().max() < (1e-4 if precision == "fp32" else 0.03)
    assert engine.places["blocks.1"] == "disk" and engine.places["norm"] == "cpu" and engine.device == CPU
    assert list(tmp_path.iterdir()), "the offloaded block is in the folder"


def create_like(model):
    other = create_model(model.spec)
    other.load_state_dict(model.state_dict())
    return other


def test_auto_finds_room_and_keeps_blocks_whole():
    model = create_model("debug_vit")
    assert set(device_map_of(model, devices="auto", max_memory={"cpu": "1GiB"}).values()) == {"cpu"}
    tight = device_map_of(model, devices="auto", max_memory={"cpu": "80KiB"})
    assert tight["blocks.1"] == "disk" and tight["norm"] == tight["cls_token"] == tight["patch_embed"] == "cpu"


def test_the_first_device_has_what_is_in_no_block():
    model = create_model("debug_vit")
    places = device_map_of(model, devices={"blocks.0": 1, "blocks.1": "cpu"})
    assert places["blocks.1"] == "cpu" and {place for key, place in places.items() if key != "blocks.1"} == {1}


def test_what_cannot_be_placed_is_said():
    model = create_model("debug_vit")
    for devices, match in (({"blocks.0": "cpu"}, "each once"), ("everywhere", "'auto'")):
        with pytest.raises(InputError, match=match):
            PlacedEngine(model, devices=devices, precision="fp32")
    with pytest.raises(InputError, match="offload"):
        PlacedEngine(model, devices={"blocks.0": "cpu", "blocks.1": "disk"}, precision="fp32")
    with pytest.raises(InputError, match="ViTs"):
        PlacedEngine(create_model("debug_convnext"), devices="auto", precision="fp32")


def test_load_takes_a_device_map(tmp_path):
    plain = dd.load("debug_vit", weights="random", engine="eager", precision="fp32", device="cpu")
    image = torch.rand(3, 64, 48)
    auto = dd.load("debug_vit", weights="random", device_map="auto", precision="fp32")
    assert "blocks on" in auto.engine_reason
    torch.testing.assert_close(auto(image).patches.cpu(), plain(image).patches, rtol=1e-4, atol=1e-4)
    places = {"blocks.0": "cpu", "blocks.1": "disk"}
    placed = dd.load("debug_vit", weights="random", device_map=places, offload=tmp_path, precision="fp32")
    assert placed.engine_reason == "blocks on cpu: 1, disk: 1"
    torch.testing.assert_close(placed(image).patches, plain(image).patches, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"engine": "openvino"}, "for engine='eager'"),
        ({"device": "cpu"}, "Leave device out"),
        ({"memory": "3GB"}, "without memory"),
        ({"device_map": {"blocks.0": "cpu"}}, "must name blocks.0 to blocks.1"),
        ({"device_map": {"blocks.0": "cpu", "blocks.1": "disk"}}, "offload="),
    ],
)
def test_a_device_map_that_contradicts_other_options_is_refused(options, reason):
    with pytest.raises(InputError, match=reason):
        dd.load("debug_vit", weights="random", **{"device_map": "auto", **options})
