from __future__ import annotations

import json
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import densedino as dd
from densedino.engines.quantized import is_quantized
from densedino.errors import InputError
from densedino.features.quantizing import quantize
from densedino.models.catalog import model_spec
from densedino.models.counts import multiplications, parameter_count
from densedino.pretrain import prune_run
from densedino.pretrain.prune_run import prune
from densedino.weights.convert import write_weights
from densedino.weights.loading import load_weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve pictures, and weights of a debug model whose blocks do something."""
    where = tmp_path_factory.mktemp("prune")
    (where / "photos").mkdir()
    rng = np.random.default_rng(0)
    for i in range(12):
        pixels = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((60, 50)).save(where / "photos" / f"{i}.png")
    model, card = load_weights("debug_vit", weights="random")
    torch.manual_seed(0)
    with torch.no_grad():
        for key, value in model.named_parameters():
            if key.endswith("gamma"):
                value.fill_(0.3)
            elif value.ndim > 1:
                value.normal_(std=0.2)
    write_weights(model.state_dict(), where / "big.safetensors", card=card)
    return where


def go(folder, output, **options):
    arguments = {"keep": 0.8, "minutes": 0, "size": 48, "most": 10, "device": "cpu", **options}
    return prune(weights=folder / "big.safetensors", images=folder / "photos", output=output, **arguments)


def test_a_pruned_model_is_smaller_near_and_loaded_like_any_weights(folder, tmp_path):
    said = []
    done = go(folder, tmp_path / "small.safetensors", say=said.append)
    whole, spec = model_spec("debug_vit"), done.pruned.model.spec
    assert done.multiplications == multiplications(spec, side=48) / multiplications(whole, side=48) <= 0.8
    assert parameter_count(spec) == sum(p.numel() for p in done.pruned.model.parameters()) < parameter_count(whole)
    assert done.fidelity.images == 2, "the report is on those of which nothing was learnt"
    assert done.closed_form == done.fidelity.tokens.mean > 0.9
    assert done.fidelity.bytes_b < done.fidelity.bytes_a
    assert any("closed form" in line for line in said)
    with safe_open(tmp_path / "small.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["densedino.fidelity"])["tokens"]["mean"] == done.fidelity.tokens.mean
    card = dd.load(weights=tmp_path / "small.safetensors").card
    assert card.model == "debug_vit-pruned" and "pruned to 0." in card.notes[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["small.safetensors"]


@pytest.fixture(scope="module")
def small(folder):
    return go(folder, folder / "small.safetensors").pruned.card.source


@pytest.mark.parametrize("engine", ["stream", "onnx", pytest.param("openvino", marks=pytest.mark.slow)])
def test_every_engine_runs_it(small, engine):
    image = torch.rand(2, 3, 64, 48, generator=torch.Generator().manual_seed(0))
    wanted = dd.load(weights=small, engine="eager", precision="fp32", device="cpu")(image)
    memory = "100GB" if engine == "stream" else None  # of the whole process, and others' tests were in it before
    found = dd.load(weights=small, engine=engine, precision="fp32", memory=memory, device="cpu")(image)
    for name in ("patches", "cls", "registers"):
        torch.testing.assert_close(getattr(found, name), getattr(wanted, name), rtol=1e-4, atol=1e-4)


def test_it_runs_in_bf16_and_merged(small):
    image = torch.rand(1, 3, 64, 48, generator=torch.Generator().manual_seed(0))
    wanted = dd.load(weights=small, engine="eager", precision="fp32", device="cpu")(image).patches
    for options in ({"precision": "bf16"}, {"merge": 0.2}):
        found = dd.load(weights=small, **options)(image).patches
        assert F.cosine_similarity(found.cpu(), wanted, dim=-1).mean() > 0.9


@pytest.mark.slow
def test_it_is_quantised_like_any_other(small, folder, tmp_path):
    quantize(weights=small, images=folder / "photos", output=tmp_path / "q.safetensors", size=48, most=8)
    assert is_quantized(tmp_path / "q.safetensors")
    assert dd.load(weights=tmp_path / "q.safetensors")(torch.rand(3, 64, 48)).patches.shape == (1, 4, 3, 32)


def stop_after(step):
    def advance(progress):
        if progress.step == step:
            signal.raise_signal(signal.SIGTERM)

    return advance


@pytest.mark.slow
def test_recovery_goes_on_after_a_stop_and_is_left_out_if_it_does_not_help(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(prune_run, "_steps", lambda *_: 12)
    said = []
    monkeypatch.setattr(prune_run, "_error", lambda *_: 1.0)
    left_out = go(folder, tmp_path / "left_out.safetensors", minutes=1, say=said.append)
    assert left_out.steps == 0 and left_out.fidelity.tokens.mean == left_out.closed_form
    assert any("no nearer" in line for line in said)
    (tmp_path / "left_out.safetensors").unlink()
    # A model of noise gains nothing in 12 steps; the moving average, which asks for no gradients, is to be taken here.
    monkeypatch.setattr(prune_run, "_error", lambda small, *_: float(next(small.parameters()).requires_grad))
    whole = go(folder, tmp_path / "whole.safetensors", minutes=1)
    assert whole.steps == 12
    assert whole.fidelity.tokens.mean != whole.closed_form
    assert go(folder, tmp_path / "parts.safetensors", minutes=1, advance=stop_after(5)) is None
    assert not (tmp_path / "parts.safetensors").exists()
    monkeypatch.setattr(prune_run, "_steps", lambda *_: 99)  # what is measured anew does not count
    parts = go(folder, tmp_path / "parts.safetensors", minutes=1)
    assert parts.steps == 12
    ours, theirs = (load_file(tmp_path / f"{name}.safetensors") for name in ("parts", "whole"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts.safetensors", "whole.safetensors"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"keep": 1.0}, "above 0 and below 1"),
        ({"keep": 0.05}, "Keep more"),
        ({"output": "x.onnx"}, r"\.safetensors"),
    ],
)
def test_what_cannot_be_is_refused_and_leaves_nothing(folder, tmp_path, options, reason):
    output = tmp_path / options.pop("output", "x.safetensors")
    with pytest.raises(InputError, match=reason):
        go(folder, output, **options)
    assert not list(tmp_path.iterdir())


def test_convnexts_and_pruned_models_are_not_pruned(small, folder, tmp_path):
    for options in ({"name": "debug_convnext", "weights": "random"}, {"weights": small}):
        with pytest.raises(InputError, match="no ViT of the table"):
            prune(images=folder / "photos", output=tmp_path / "x.safetensors", minutes=0, **options)
