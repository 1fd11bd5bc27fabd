from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import densedino as dd
from densedino.engines import streamed
from densedino.engines.eager import EagerEngine
from densedino.engines.streamed import StreamEngine
from densedino.errors import InputError, WeightsError
from densedino.models import catalog
from densedino.models.catalog import create_model
from densedino.models.rope import rope_periods
from densedino.weights.dialects import from_meta
from densedino.weights.loading import load_stored, load_weights
from densedino.weights.packing import pack_weights

CPU = torch.device("cpu")
ROOM = 500_000_000


def random_state(name, dtype=torch.float32):
    torch.manual_seed(0)
    state = create_model(name).state_dict()
    for key, value in state.items():
        if key.endswith("gamma"):
            value.normal_(0.3, 0.05)
        elif key.endswith("bias"):
            value.normal_(std=0.1)
    return {key: value.to(dtype) for key, value in state.items()}


@pytest.fixture
def deep(monkeypatch):
    """A small model with enough blocks for the buffers to go round."""
    spec = replace(catalog.MODELS["debug_vit_swiglu"], name="deep", embed_dim=128, hidden_dim=256, depth=5)
    monkeypatch.setitem(catalog.MODELS, "deep", spec)
    return "deep"


def assert_same(got, wanted, *, atol=0.0):
    for one, other in zip(got, wanted, strict=True):
        for field in ("patches", "cls", "registers"):
            a, b = getattr(one, field), getattr(other, field)
            assert a.dtype == torch.float32 and a.shape == b.shape
            torch.testing.assert_close(a, b, atol=atol, rtol=0)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["debug_vit", "debug_vit_swiglu", "deep"])
def test_tokens_are_those_of_the_model_in_memory(tmp_path, deep, name, precision, norm):
    save_file(random_state(name), tmp_path / "x.safetensors")
    pixels = torch.randn(3, 3, 48, 80)
    model, _ = load_weights(weights=tmp_path / "x.safetensors")
    eager = EagerEngine(model, device=CPU, precision=precision)
    engine = StreamEngine(load_stored(weights=tmp_path / "x.safetensors"), precision=precision, memory="100GB")
    for layers in ((-1,), (1, -1, 0)):
        assert_same(engine(pixels, layers=layers, norm=norm), eager(pixels, layers=layers, norm=norm))
    assert engine.model.spec.name == name and engine.precision == precision and engine.device == CPU


@pytest.mark.parametrize("change", [{"buffers": 1}, {"attention_images": 1}, {"mlp_tokens": 7}])
def test_every_way_through_gives_the_same(tmp_path, deep, change, monkeypatch):
    save_file(random_state(deep), tmp_path / "x.safetensors")
    pixels = torch.randn(5, 3, 32, 48)
    engine = StreamEngine(load_stored(weights=tmp_path / "x.safetensors"), precision="fp32", memory="100GB")
    wanted = engine(pixels, layers=(-1, 2))
    plan_stream = streamed.plan_stream
    monkeypatch.setattr(streamed, "plan_stream", lambda *a, **k: replace(plan_stream(*a, **k), **change))
    assert_same(engine(pixels, layers=(-1, 2)), wanted, atol=2e-5)


@pytest.mark.parametrize("dialect", ["huggingface", "meta", "timm"])
def test_every_dialect_and_type_streams(tmp_path, deep, dialect):
    state = from_meta(random_state(deep), dialect)
    if dialect == "meta":
        torch.save(state, tmp_path / "x")
    else:
        save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "x")
    pixels = torch.randn(1, 3, 32, 32)
    model, _ = load_weights(weights=tmp_path / "x")
    wanted = EagerEngine(model, device=CPU, precision="bf16")(pixels)
    assert_same(StreamEngine(load_stored(weights=tmp_path / "x"), memory="100GB")(pixels), wanted)


def test_a_bfloat16_file_gives_what_its_model_gives_in_mixed_precision(tmp_path, deep):
    save_file(random_state(deep, torch.bfloat16), tmp_path / "x.safetensors")
    pixels = torch.randn(2, 3, 32, 48)
    model, _ = load_weights(weights=tmp_path / "x.safetensors", dtype=torch.float32)
    wanted = EagerEngine(model, device=CPU, precision="bf16")(pixels)
    assert_same(StreamEngine(load_stored(weights=tmp_path / "x.safetensors"), memory="100GB")(pixels), wanted)


@pytest.mark.parametrize(("to", "least"), [("bf16", 0.9999), ("int8", 0.9995), ("int4", 0.97)])
def test_packed_weights_stream_and_are_near(tmp_path, deep, to, least):
    save_file(random_state(deep), tmp_path / "x.safetensors")
    source = load_stored(weights=tmp_path / "x.safetensors")
    pack_weights(source, tmp_path / "p.safetensors", to=to)
    pixels = torch.randn(2, 3, 64, 64)
    (exact,) = StreamEngine(source, precision="fp32", memory="100GB")(pixels)
    (packed,) = StreamEngine(load_stored(weights=tmp_path / "p.safetensors"), memory="100GB")(pixels)
    assert torch.cosine_similarity(exact.patches, packed.patches, dim=-1).mean() > least


def test_a_budget_too_small_says_the_least_that_works(tmp_path, deep):
    save_file(random_state(deep), tmp_path / "x.safetensors")
    source = load_stored(weights=tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=r"memory 1 MB is too small: deep on 2 images .* needs at least .* MB"):
        StreamEngine(source, memory="1MB")(torch.randn(2, 3, 32, 32))


def test_what_cannot_stream_is_said(tmp_path):
    save_file(create_model("debug_convnext").state_dict(), tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="engine='eager'"):
        StreamEngine(load_stored(weights=tmp_path / "x.safetensors"))
    save_file(random_state("debug_vit"), tmp_path / "y.safetensors")
    engine = StreamEngine(load_stored(weights=tmp_path / "y.safetensors"), memory="100GB")
    with pytest.raises(InputError, match="multiples of 16"):
        engine(torch.randn(1, 3, 17, 32))
    with pytest.raises(InputError, match="block indices"):
        engine(torch.randn(1, 3, 16, 16), layers=(2,))


def test_a_file_that_is_replaced_stops_the_run(tmp_path, deep):
    if not sys.platform.startswith("linux"):
        pytest.skip("elsewhere tensors are read through the mapping, which stays what it was")
    path = tmp_path / "x.safetensors"
    save_file(random_state(deep), path)
    engine = StreamEngine(load_stored(weights=path), memory="100GB")
    save_file(random_state(deep), tmp_path / "y")
    (tmp_path / "y").replace(path)
    with pytest.raises(WeightsError, match="replaced"):
        engine(torch.randn(1, 3, 16, 16))


BIG = """
import sys, torch
from dataclasses import replace
from densedino.models import catalog
catalog.MODELS["vit7b16"] = replace(catalog.MODELS["vit7b16"], embed_dim=1024, hidden_dim=4096, num_heads=16, depth=16)
from densedino.engines.streamed import StreamEngine
from densedino.weights.loading import load_stored
engine = StreamEngine(load_stored(weights=sys.argv[1]), memory=sys.argv[2])
pixels = torch.randn(2, 3, 256, 256)
plan = engine.plan(pixels)
engine(pixels)
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]
print(plan.peak_bytes, int(peak) << 10)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_the_process_stays_within_the_budget(tmp_path, monkeypatch):
    """A model of 0.55 GB in bfloat16, of which 0.4 GB would not fit beside the process."""
    spec = replace(catalog.MODELS["vit7b16"], embed_dim=1024, hidden_dim=4096, num_heads=16, depth=16)
    monkeypatch.setitem(catalog.MODELS, "vit7b16", spec)
    meta = create_model("vit7b16", device="meta").state_dict()
    state = {key: torch.full(value.shape, 0.01, dtype=torch.bfloat16) for key, value in meta.items()}
    state["rope_embed.periods"] = create_model(replace(spec, depth=1)).rope_embed.periods
    save_file(state, tmp_path / "x.safetensors")
    assert (tmp_path / "x.safetensors").stat().st_size > 5e8
    command = [sys.executable, "-c", BIG, str(tmp_path / "x.safetensors")]
    done = subprocess.run([*command, "1GB"], capture_output=True, text=True, check=True)
    planned, peak = map(int, done.stdout.split())
    assert peak < planned <= 1e9 and planned < peak + 2e8


def test_load_and_extract_stream_in_large_batches(tmp_path, deep, monkeypatch):
    save_file(random_state(deep), tmp_path / "x.safetensors")
    dino = dd.load(weights=tmp_path / "x.safetensors", engine="stream", memory="50GB")
    eager = dd.load(weights=tmp_path / "x.safetensors", engine="eager", precision="bf16", device="cpu")
    image = np.random.default_rng(0).integers(0, 255, (40, 64, 3), np.uint8)
    torch.testing.assert_close(dino(image).patches, eager(image).patches, atol=0, rtol=0)
    assert dino.engine.name == "stream" and dino.precision == "bf16"
    for i in range(12):
        Image.fromarray(image + i).save(tmp_path / f"{i}.png")
    batches = []
    monkeypatch.setattr(
        StreamEngine, "__call__", lambda self, pixels, **k: batches.append(len(pixels)) or eager.engine(pixels, **k)
    )
    report = dd.extract(dino, [tmp_path], output=tmp_path / "features")
    assert report.total == 12 and batches == [12] and report.plan.memory_bytes == 50 * 10**9


@pytest.mark.slow
def test_four_blocks_of_the_largest_width_are_those_in_memory(tmp_path, monkeypatch):
    """1.4 GB in bfloat16, of which the streaming engine has two blocks in memory at a time."""
    spec = replace(catalog.MODELS["vit7b16"], depth=4)
    monkeypatch.setitem(catalog.MODELS, "vit7b16", spec)
    generator = torch.Generator().manual_seed(0)
    state = {}
    for key, value in create_model(spec, device="meta").state_dict().items():
        state[key] = torch.empty(value.shape, dtype=torch.bfloat16).normal_(std=0.02, generator=generator)
        if key.endswith("gamma") or (value.ndim == 1 and key.endswith("norm.weight")):
            state[key].fill_(0.5)
    state["rope_embed.periods"] = rope_periods(128, spec.rope_base)
    save_file(state, tmp_path / "x.safetensors")
    del state
    pixels = torch.randn(2, 3, 64, 96)
    got = StreamEngine(load_stored(weights=tmp_path / "x.safetensors"), memory="100GB")(pixels, layers=(-1, 1))
    model, _ = load_weights(weights=tmp_path / "x.safetensors")
    assert_same(got, EagerEngine(model, device=CPU, precision="bf16")(pixels, layers=(-1, 1)), atol=1e-6)
