from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch
import torch.nn.functional as F

from densedino.engines.eager import EagerEngine
from densedino.engines.openvino import has_bf16, openvino, openvino_engine
from densedino.errors import InputError

DEBUG = ("debug_vit", "debug_vit_swiglu", "debug_convnext")


@pytest.fixture(autouse=True)
def _shared(compiled_cache, monkeypatch):
    monkeypatch.setenv("DENSEDINO_CACHE", str(compiled_cache))


@pytest.mark.parametrize("name", DEBUG)
def test_tokens_are_those_of_eager_at_any_size(lively, name) -> None:
    model = lively(name)
    exact = EagerEngine(model, device=torch.device("cpu"), precision="fp32")
    engine = openvino_engine(model, precision="fp32")
    assert (engine.name, engine.precision) == ("openvino", "fp32")
    for batch, rows, columns in ((1, 1, 1), (3, 4, 2), (1, 2, 7)):
        image = torch.randn(batch, 3, rows * model.stride, columns * model.stride)
        for layers, norm in (((-1,), True), ((-1, 0), False)):
            for got, want in zip(
                engine(image, layers=layers, norm=norm), exact(image, layers=layers, norm=norm), strict=True
            ):
                assert got.patches.shape == want.patches.shape
                assert got.registers.shape == want.registers.shape
                torch.testing.assert_close(got.patches, want.patches, atol=2e-5, rtol=0)
                torch.testing.assert_close(got.cls, want.cls, atol=2e-5, rtol=0)


def test_bf16_is_close(lively) -> None:
    if not has_bf16():
        with pytest.raises(InputError, match="no bfloat16"):
            openvino_engine(lively("debug_vit"), precision="bf16")
        return
    model = lively("debug_vit")
    image = torch.randn(2, 3, 64, 96)
    got = openvino_engine(model, precision="bf16")(image)[0].patches
    want = EagerEngine(model, device=torch.device("cpu"), precision="fp32")(image)[0].patches
    assert F.cosine_similarity(got, want, dim=-1).min() > 0.999
    assert not torch.equal(got, want)


def test_any_number_of_threads_may_call(lively) -> None:
    engine = openvino_engine(lively("debug_vit"), precision="fp32")
    images = [torch.randn(1, 3, 16 * i, 32) for i in range(1, 5)]
    alone = [engine(image)[0].patches for image in images]
    wrong = []

    def work(i):
        wrong.extend(i for _ in range(20) if not torch.equal(engine(images[i])[0].patches, alone[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_results_stay_what_they_are_after_the_next_call(lively) -> None:
    engine = openvino_engine(lively("debug_vit"), precision="fp32")
    image = torch.randn(1, 3, 32, 32)
    first = engine(image)[0].patches
    before = first.clone()
    engine(torch.randn(1, 3, 32, 32))
    assert torch.equal(first, before)


def test_changed_weights_show(lively) -> None:
    engine = openvino_engine(lively("debug_vit"), precision="fp32")
    image = torch.randn(1, 3, 32, 32)
    before = engine(image)[0].patches
    with torch.no_grad():
        engine.model.blocks[0].ls1.gamma.zero_()
    assert not torch.allclose(engine(image)[0].patches, before, atol=1e-3)


def test_nothing_is_reported_to_anybody() -> None:
    """OpenVINO and NNCF send every use to Intel unless their telemetry cannot be imported."""
    openvino()
    assert sys.modules["openvino_telemetry"] is None


SIGNALLED = """
import faulthandler, gc, signal, torch
from densedino.engines.openvino import openvino_engine
from densedino.models.catalog import create_model
faulthandler.enable()                                  # has a stack for signals, as pytest does
torch.set_num_threads(1)
first, second = (openvino_engine(create_model(name), precision="fp32") for name in ("debug_vit", "debug_convnext"))
for engine in (first, second):
    engine(torch.randn(1, 3, 32, 32))
del first, engine
gc.collect()
del second
gc.collect()
signal.signal(signal.SIGTERM, lambda *_: print("alive"))
signal.raise_signal(signal.SIGTERM)
"""


def test_signals_reach_a_process_whose_engines_came_and_went(tmp_path) -> None:
    environment = os.environ | {"DENSEDINO_CACHE": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", SIGNALLED], env=environment, capture_output=True, text=True, check=False
    )
    assert (run.returncode, run.stdout) == (0, "alive\n"), run.stderr
