"""Owns what is known about this machine: its parts, what is installed, and how fast it is."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from densedino.engines.eager import choose_device, choose_precision
from densedino.features.extractor import load
from densedino.models.layers import linear
from densedino.weights.sources import cache_dir

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["EXTRAS", "Extra", "Speed", "environment", "measure_speed"]

_GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Extra:
    """Optional packages that one `pip install 'densedino[name]'` brings."""

    name: str
    packages: tuple[str, ...]
    """Distribution names."""
    enables: str

    @property
    def command(self) -> str:
        """How to install them."""
        return f"pip install 'densedino[{self.name}]'"

    def versions(self) -> dict[str, str | None]:
        """Installed version of every package; None for one that is not there."""
        return {package: _version(package) for package in self.packages}


EXTRAS = (
    Extra(name="video", packages=("av",), enables="features of video frames"),
    Extra(
        name="interop",
        packages=("transformers", "timm", "huggingface-hub"),
        enables="weights from the Hugging Face and timm hubs; opening what `weights convert` writes",
    ),
    Extra(
        name="train",
        packages=("datasets", "tensorboard"),
        enables="training on Hugging Face data sets; curves in TensorBoard",
    ),
    Extra(
        name="engines",
        packages=("accelerate", "openvino", "nncf", "onnx", "onnxscript", "onnxruntime"),
        enables="models at several times the speed on CPUs; int8; export to OpenVINO and ONNX",
    ),
    Extra(name="xarray", packages=("xarray",), enables="stored features as xarray"),
    Extra(
        name="geo",
        packages=("rasterio", "xarray", "zarr", "pyogrio"),
        enables="scenes with coordinates, in and out: GeoTIFF, Zarr, vectors",
    ),
    Extra(name="eval", packages=("matplotlib", "scikit-learn", "scipy"), enables="protocols that judge features"),
    Extra(name="adapt", packages=("peft",), enables="LoRA on a frozen backbone"),
    Extra(name="text", packages=("ftfy", "regex"), enables="queries in words"),
    Extra(name="scale", packages=("ray",), enables="extraction over many machines"),
    Extra(
        name="serve",
        packages=("fastapi", "uvicorn", "python-multipart", "prometheus-client"),
        enables="the page that shows features, and features over HTTP",
    ),
)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def environment() -> dict[str, str]:
    """Names and values worth quoting in a bug report."""
    from densedino import __version__

    threads = os.environ.get("OMP_NUM_THREADS", "unset")
    free = shutil.disk_usage(_nearest_existing(cache_dir())).free
    return {
        "densedino": f"{__version__} in {Path(__file__).parent.parent}",
        "Python": f"{platform.python_version()} at {sys.executable}",
        "system": platform.platform(),
        "CPU": f"{_cpu_name()}, {os.cpu_count()} logical cores, {torch.backends.cpu.get_cpu_capability()}",
        "threads": f"{torch.get_num_threads()} used by PyTorch, OMP_NUM_THREADS {threads}",
        "load": f"{os.getloadavg()[0]:.1f} cores busy in the last minute" if hasattr(os, "getloadavg") else "unknown",
        "memory": _memory(),
        "PyTorch": f"{torch.__version__}, {_build()}",
        "torchvision": _version("torchvision") or "not installed",
        "numpy": _version("numpy") or "not installed",
        "Pillow": _version("pillow") or "not installed",
        "Lance": _version("pylance") or "not installed",
        "devices": "; ".join(_devices()),
        "chosen": f"device {choose_device()}, precision {choose_precision('auto', choose_device())}",
        "cache": f"{cache_dir()}, {free / _GIB:.1f} GiB free",
    }


def _nearest_existing(path: Path) -> Path:
    return next(p for p in (path, *path.absolute().parents) if p.exists())


def _cpu_name() -> str:
    if sys.platform == "linux":
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        if names:
            return names[0]
    if sys.platform == "darwin":
        asked = subprocess.run(
            ["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=False
        )
        if asked.returncode == 0:
            return asked.stdout.strip()
    return platform.processor() or platform.machine()


def _memory() -> str:
    if not hasattr(os, "sysconf"):  # Windows
        return "unknown"
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / _GIB
    info = Path("/proc/meminfo")
    if not info.exists():
        return f"{total:.1f} GiB"
    available = next(int(line.split()[1]) for line in info.read_text().splitlines() if line.startswith("MemAvailable"))
    return f"{total:.1f} GiB, {available * 1024 / _GIB:.1f} GiB free"


def _build() -> str:
    if torch.version.cuda:
        return f"built for CUDA {torch.version.cuda}"
    return f"built for ROCm {torch.version.hip}" if torch.version.hip else "built for the CPU"


def _devices() -> list[str]:
    found = ["cpu"]
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, total = torch.cuda.mem_get_info(i)
        found.append(f"cuda:{i} {torch.cuda.get_device_name(i)}, {total / _GIB:.0f} GiB, {free / _GIB:.0f} GiB free")
    if torch.backends.mps.is_available():
        found.append("mps")
    return found


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What was measured."""

    device: str
    precision: str
    matmul_gflops: dict[str, float]
    """By precision: a product of two 2048×2048 matrices, by the kernel the models use."""
    images_per_second: float
    """The model's forward pass at 224×224 in batches of 8, without reading images."""
    model: str
    busy: bool
    """Whether other programs wanted more cores than there are before it began: an idle machine is faster."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe."""
        return asdict(self)


def measure_speed(model: str = "vitt16") -> Speed:
    """Time matrix products and `model` (random weights) on the device that `dd.load` would choose; takes seconds."""
    busy = hasattr(os, "getloadavg") and os.getloadavg()[0] > (os.cpu_count() or 1)
    device = choose_device()
    dino = load(model, weights="random", device=device, engine="eager")
    pixels = torch.zeros(8, 3, 224, 224, device=device)
    per_batch = _median_seconds(lambda: dino.engine(pixels), device, budget=2.0)
    matmul = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        square = torch.ones(2048, 2048, device=device, dtype=dtype)
        with torch.inference_mode():
            seconds = _median_seconds(functools.partial(linear, square, square, None), device, budget=1.0)
        matmul[name] = 2 * 2048**3 / seconds / 1e9
    return Speed(
        device=str(device),
        precision=dino.precision,
        matmul_gflops=matmul,
        images_per_second=len(pixels) / per_batch,
        model=model,
        busy=busy,
    )


def _median_seconds(call: Callable[[], object], device: torch.device, *, budget: float) -> float:
    """Median time of one call, over as many as fit in `budget` seconds, at least three; the first is not counted."""

    def timed() -> float:
        start = time.perf_counter()
        call()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return time.perf_counter() - start

    timed()
    times: list[float] = []
    while len(times) < 3 or sum(times) < budget:
        times.append(timed())
    return sorted(times)[len(times) // 2]
