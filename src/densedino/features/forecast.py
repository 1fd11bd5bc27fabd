"""Owns the forecast of a run before anything is loaded: what each way to run a model takes, and what fits here."""

from __future__ import annotations

import functools
import importlib.util
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from densedino.engines.budget import available_bytes, format_bytes, least_stream, plan_stream, resident_bytes
from densedino.errors import InputError
from densedino.features.extractor import load
from densedino.models.catalog import ViTSpec
from densedino.models.counts import block_parameters, multiplications, parameter_count
from densedino.models.layers import linear

if TYPE_CHECKING:
    from collections.abc import Mapping

    from densedino.models.catalog import ConvNeXtSpec

__all__ = ["Forecast", "Way", "activation_bytes", "floor_bytes", "forecast", "product_rates"]

_STREAM_DEFAULT = 3 * 10**9
_READING = 1e9  # bytes per second, of an ordinary SSD
_OVERHEAD = {"eager": 1.5, "compile": 1.35, "openvino": 1.3, "stream": 1.2}  # time of all over that of the products
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Engine, precision, bytes of weights per parameter, note. A float32 file is mapped; what is cast stands beside it.
_IN_MEMORY = (
    ("eager", "fp32", 4, ""),
    ("eager", "bf16", 6, ""),
    ("eager", "bf16", 2, "if the file is in bf16: densedino weights pack FILE --to bf16"),
    ("compile", "fp32", 4, ""),
    ("compile", "bf16", 6, ""),
    ("openvino", "fp32", 8, ""),
    ("openvino", "bf16", 8, ""),
)


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to run the model."""

    engine: str
    precision: str
    memory_bytes: int
    """Peak of a process that loads the model and runs batches."""
    seconds: float
    """For all images, without reading them."""
    fits: bool
    """In what this machine has free, or in the memory given."""
    note: str


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What is known beforehand."""

    parameters: int
    multiply_adds: int
    """Of one image."""
    tokens: int
    """Of one image, with CLS and registers."""
    activation_bytes: int
    """Of a batch in float32."""
    floor_bytes: int
    """Python, PyTorch and densedino themselves."""
    available_bytes: int
    """Of memory, that this machine has free."""
    rates: Mapping[str, float]
    """FLOP/s of the model's products here, by precision."""
    ways: tuple[Way, ...]

    @property
    def best(self) -> Way | None:
        """The fastest that fits and is installed; what reads the weights from disk for each batch comes last."""
        able = [way for way in self.ways if way.fits]
        return min(able, key=lambda way: (way.engine == "stream", way.seconds), default=None)


def activation_bytes(
    spec: ViTSpec | ConvNeXtSpec, *, images: int, size: tuple[int, int], precision: str, in_chans: int = 3
) -> int:
    """What a batch takes besides the weights, at its peak: temporaries of one block, the tokens, and the pixels."""
    height, width = (-(-side // spec.stride) for side in size)
    # As prepared and in the batch; and what the preparation of one leaves behind.
    pixels = (2 * images + 4) * in_chans * 4 * height * width * spec.stride**2
    if not isinstance(spec, ViTSpec):
        places = 64 * height * width  # of the first stage, whose maps are the largest
        return pixels + images * places * spec.dims[0] * 4 * 7
    tokens = 1 + spec.num_register_tokens + height * width
    dim, hidden = spec.embed_dim, spec.hidden_dim
    number = 2 if precision == "bf16" else 4
    attention = 8 * dim + (8 if precision == "fp32" else 12) * dim * number
    fused = spec.ffn == "mlp" and dim < 1024  # GELU in one pass with its product
    inner = 8 * dim + (1 if fused else 2) * hidden * number + dim * number
    return pixels + images * tokens * max(attention, inner)


@functools.cache
def floor_bytes() -> int:
    """Memory of this process once everything is imported and a tiny model has run."""
    dino = load("debug_vit", weights="random", engine="eager", precision="fp32", device="cpu")
    dino(torch.zeros(3, 64, 64))
    return resident_bytes()


def product_rates(spec: ViTSpec | ConvNeXtSpec, *, seconds: float = 0.3) -> dict[str, float]:
    """FLOP/s of a product of the model's width on this CPU, by precision: the best of what fits in `seconds` each."""
    width = spec.embed_dim
    rates = {}
    for name, dtype in _DTYPES.items():
        x, weight = torch.ones(1024, width, dtype=dtype), torch.ones(4 * width, width, dtype=dtype)
        best, end = float("inf"), time.perf_counter() + seconds
        with torch.inference_mode():
            linear(x, weight, None)
            while best == float("inf") or time.perf_counter() < end:
                start = time.perf_counter()
                linear(x, weight, None)
                best = min(best, time.perf_counter() - start)
        rates[name] = 2 * x.numel() * 4 * width / best
    return rates


def forecast(
    spec: ViTSpec | ConvNeXtSpec, *, images: int, size: tuple[int, int], batch: int, memory: int | None = None
) -> Forecast:
    """Foretell a run on this machine's CPU: measures its products for a second, and loads nothing.

    Args:
        spec: of the model.
        images: how many in all.
        size: height and width that the model sees, in pixels.
        batch: images at a time.
        memory: bytes that may be used; what the machine has free if not given.

    Raises:
        InputError: no images, or no size.
    """
    if images < 1 or batch < 1 or min(size) < 1:
        raise InputError(f"{images} images of {size[0]}×{size[1]} pixels, {batch} at a time: all must be 1 or more.")
    batch = min(batch, images)
    floor, free, rates = floor_bytes(), available_bytes(), product_rates(spec)
    room = memory or free
    tokens = -(-size[0] // spec.stride) * -(-size[1] // spec.stride) + 1 + spec.num_register_tokens
    macs = multiplications(spec, side=size)
    ways = []
    for engine, precision, number, note in _IN_MEMORY:
        peak = floor + number * parameter_count(spec)
        peak += activation_bytes(spec, images=batch, size=size, precision=precision)
        installed = engine != "openvino" or importlib.util.find_spec("openvino") is not None
        ways.append(
            Way(
                engine=engine,
                precision=precision,
                memory_bytes=peak,
                seconds=_OVERHEAD[engine] * 2 * macs * images / rates[precision],
                fits=peak <= room and installed,
                note=note if installed else "pip install 'densedino[engines]'",
            )
        )
    if isinstance(spec, ViTSpec):
        seconds = _OVERHEAD["stream"] * 2 * macs * images / rates["bf16"]
        ways.append(_stream(spec, images, batch, tokens, seconds=seconds, floor=floor, memory=memory, room=room))
    return Forecast(
        parameters=parameter_count(spec),
        multiply_adds=macs,
        tokens=tokens,
        activation_bytes=activation_bytes(spec, images=batch, size=size, precision="fp32"),
        floor_bytes=floor,
        available_bytes=free,
        rates=rates,
        ways=tuple(ways),
    )


def _stream(
    spec: ViTSpec, images: int, batch: int, tokens: int, *, seconds: float, floor: int, memory: int | None, room: int
) -> Way:
    """Reading goes on beside computing, which takes `seconds`; weights are read once per batch."""
    file = 2 * parameter_count(spec)
    rounds = -(-images // batch)
    seconds = max(seconds, rounds * file / _READING)
    held = floor + 4 * (parameter_count(spec) - spec.depth * block_parameters(spec))
    needed = least_stream(spec, images=batch, tokens=tokens, outputs=1, dtype=torch.bfloat16, resident=held).peak_bytes
    note = "the least that works"
    if needed <= room:
        budget = memory or max(needed, min(room, _STREAM_DEFAULT))
        needed = plan_stream(
            spec, images=batch, tokens=tokens, outputs=1, dtype=torch.bfloat16, budget=budget, resident=held
        ).peak_bytes
        note = f"memory={format_bytes(budget)}; a bf16 file of {format_bytes(file)} is read {rounds}×"
    return Way(engine="stream", precision="bf16", memory_bytes=needed, seconds=seconds, fits=needed <= room, note=note)
