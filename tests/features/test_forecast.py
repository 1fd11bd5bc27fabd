from __future__ import annotations

import subprocess
import sys

import pytest

from densedino.engines import budget
from densedino.errors import InputError
from densedino.features.forecast import activation_bytes, forecast
from densedino.models.catalog import MODELS

RUN = """
import sys, numpy
import densedino as dd
name, engine, precision, side, batch = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
dino = dd.load(name, weights="random", engine=engine, precision=precision)
images = [numpy.full((side, side, 3), 100 + i, numpy.uint8) for i in range(batch)]
dino(images, batch_size=batch)
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""

PLAN = """
import sys
from densedino.features.forecast import forecast
from densedino.models.catalog import MODELS
name, engine, precision, side, batch = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
found = forecast(MODELS[name], images=batch, size=(side, side), batch=batch)
print(next(way.memory_bytes for way in found.ways if (way.engine, way.precision) == (engine, precision)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
@pytest.mark.parametrize(
    ("name", "engine", "precision", "side", "batch"),
    [
        ("vits16", "eager", "fp32", 512, 8),
        ("vitb16", "eager", "bf16", 224, 8),
        pytest.param("vits16", "eager", "fp32", 224, 1, marks=pytest.mark.slow),
        pytest.param("vits16", "eager", "bf16", 1024, 2, marks=pytest.mark.slow),
        pytest.param("vitb16", "eager", "bf16", 512, 8, marks=pytest.mark.slow),
        pytest.param("convnext_tiny", "eager", "fp32", 512, 8, marks=pytest.mark.slow),
    ],
)
def test_memory_is_what_then_happens_within_15_percent(name, engine, precision, side, batch):
    arguments = [name, engine, precision, str(side), str(batch)]
    planned, peak = (  # each in a fresh process: this one holds what earlier tests left
        int(subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True).stdout)
        for code in (PLAN, RUN)
    )
    peak <<= 10
    assert peak * 0.85 <= planned <= peak * 1.15, f"planned {planned / 1e6:.0f} MB, was {peak / 1e6:.0f} MB"


def test_a_large_model_fits_only_by_streaming(monkeypatch):
    monkeypatch.setattr("densedino.features.forecast.available_bytes", lambda: 8 * 10**9)
    found = forecast(MODELS["vit7b16"], images=16, size=(512, 512), batch=8)
    assert found.best is not None and found.best.engine == "stream" and found.best.memory_bytes <= 3e9
    assert [way.engine for way in found.ways if way.fits] == ["stream"]
    assert found.parameters == 6_716_043_264 and found.tokens == 1029
    tight = forecast(MODELS["vit7b16"], images=16, size=(512, 512), batch=8, memory=900_000_000)
    assert tight.best is None and tight.ways[-1].note == "the least that works"
    assert tight.ways[-1].memory_bytes > 900_000_000


def test_a_small_model_is_not_streamed():
    found = forecast(MODELS["vits16"], images=3, size=(224, 300), batch=8)
    assert found.best is not None and found.best.engine != "stream" and found.tokens == 14 * 19 + 5
    with pytest.raises(InputError, match="0 images"):
        forecast(MODELS["vits16"], images=0, size=(224, 224), batch=8)


def test_activations_grow_with_images_and_pixels():
    for name in ("vits16", "convnext_tiny"):
        one = activation_bytes(MODELS[name], images=1, size=(512, 512), precision="fp32")
        assert activation_bytes(MODELS[name], images=4, size=(512, 512), precision="fp32") > 2 * one
        assert activation_bytes(MODELS[name], images=1, size=(1024, 1024), precision="fp32") > 3 * one


def test_a_control_group_limits_what_is_free(monkeypatch, tmp_path):
    free = budget.available_bytes()
    assert free > 0
    numbers = {"memory.max": 5_000_000, "memory.current": 1_000_000}
    monkeypatch.setattr(budget, "_number", lambda path: numbers[path.name])
    assert budget.available_bytes() == min(budget.available_bytes(), 4_000_000)
