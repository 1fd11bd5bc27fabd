from __future__ import annotations

import importlib
import importlib.util
import sys

import pytest
import torch

import densedino as dd
from densedino.engines.choice import ENGINES, PRECISIONS, choose_engine
from densedino.errors import InputError, MissingExtraError, UnknownNameError

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def without(monkeypatch):
    """A function that makes a package look as if it was not installed."""

    def hide(package):
        monkeypatch.setitem(sys.modules, package, None)
        find = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == package else find(name, *a))

        def load(name, *args):
            if name == package:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
            return original(name, *args)

        original = importlib.import_module
        monkeypatch.setattr(importlib, "import_module", load)

    return hide


def test_auto_says_why(without) -> None:
    small = choose_engine(device=CPU, parameters=10_000)
    assert (small.engine, small.precision) == ("eager", "fp32")
    assert "small" in small.reason
    large = choose_engine(device=CPU, parameters=21_000_000)
    assert (large.engine, large.precision) == ("openvino", "fp32")
    without("openvino")
    missing = choose_engine(device=CPU, parameters=21_000_000)
    assert missing.engine == "eager"
    assert "pip install 'densedino[engines]'" in missing.reason
    assert choose_engine(device=GPU, precision="fp32", parameters=21_000_000).engine == "eager"
    assert choose_engine(device=CPU, parameters=0, memory=True).engine == "stream"
    assert all("\n" not in choice.reason for choice in (small, large, missing))


def test_int8_goes_to_openvino() -> None:
    assert choose_engine(device=CPU, precision="int8", parameters=1).engine == "openvino"
    with pytest.raises(InputError, match="not on cuda"):
        choose_engine(device=GPU, precision="int8", parameters=1)


@pytest.mark.parametrize("engine", [name for name in ENGINES if name != "auto"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_pair_is_chosen_or_refused_with_a_way_out(engine, precision) -> None:
    try:
        choice = choose_engine(engine, precision=precision, device=CPU, parameters=1)
    except InputError as error:
        assert f"engine {engine!r} has no precision {precision!r}" in str(error)
        assert "runs with engine=" in str(error)
    else:
        assert choice.engine == engine
        assert choice.precision != "auto"


def test_wrong_words_are_errors() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'openvino'"):
        choose_engine("openvion", device=CPU, parameters=1)
    with pytest.raises(UnknownNameError, match="precision"):
        choose_engine(precision="int7", device=CPU, parameters=1)
    with pytest.raises(InputError, match="overflow"):
        choose_engine(precision="fp16", device=CPU, parameters=1)
    with pytest.raises(InputError, match="runs on the CPU"):
        choose_engine("openvino", device=GPU, parameters=1)
    with pytest.raises(InputError, match="budget"):
        choose_engine("eager", device=CPU, parameters=1, memory=True)


@pytest.mark.parametrize(("engine", "package"), [("openvino", "openvino"), ("onnx", "onnxruntime")])
def test_a_missing_package_is_one_error_with_the_command(without, engine, package) -> None:
    without(package)
    with pytest.raises(MissingExtraError, match=r"pip install 'densedino\[engines\]'"):
        dd.load("debug_vit", weights="random", device="cpu", engine=engine)


@pytest.mark.parametrize("engine", ["eager", "openvino", "onnx"])
def test_one_word_picks_the_engine_and_features_agree(photos, engine) -> None:
    dino = dd.load("debug_vit", weights="random", device="cpu", engine=engine)
    exact = dd.load("debug_vit", weights="random", device="cpu", engine="eager")
    assert dino.engine.name == engine
    assert dino.engine_reason == "as asked"
    path = photos / "coffee.jpg"
    got, want = dino(path, layers=(0,)), exact(path, layers=(0,))
    assert torch.allclose(got.patches, want.patches, atol=2e-5)
    assert torch.allclose(got.layers[0].patches, want.layers[0].patches, atol=2e-5)
    assert got.registers.shape == want.registers.shape
    assert dino.fingerprint == exact.fingerprint, "engines agree in fp32: one store takes them all"
