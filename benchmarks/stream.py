"""The streaming engine on a ViT-7B/16 of random weights: time against what the machine allows, peak memory, and peers.

    python benchmarks/stream.py                        all of ViT-7B: writes 13.4 GB under /var/tmp and removes them
    python benchmarks/stream.py --depth 4              a tenth of it: 4 blocks of the same width

Printed, all of one run: the time to read the file once, the rate of a bfloat16 matrix product of the model's own shape,
the time that the model's multiplications take at that rate, and for each way to run it the seconds per batch after
loading and the peak RSS of its process; the same in processor time, which other programs on the machine disturb less.
Ways: densedino's stream engine; `accelerate` disk offload of transformers' DINOv3ViTModel with the same weights in
bfloat16, and in float32, which is what a plain script computes in. Repeated in turns with --rounds; medians.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from densedino.models import catalog
from densedino.models.counts import multiplications
from densedino.models.rope import rope_periods

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

WAYS = ("stream", "accelerate-bf16", "accelerate-fp32")


def use_depth(depth: int) -> catalog.ViTSpec:
    """Of ViT-7B's table row, so many blocks; known to the loader as vit7b16 in this process."""
    spec = replace(catalog.MODELS["vit7b16"], depth=depth)
    catalog.MODELS["vit7b16"] = spec
    return spec


def write_model(path: Path, spec: catalog.ViTSpec) -> None:
    """Random weights under the released names, a tensor at a time."""
    from densedino.weights.writing import write_tensors

    generator = torch.Generator().manual_seed(0)
    meta = catalog.create_model(spec, device="meta").state_dict()

    def tensors() -> Iterator[torch.Tensor]:
        for key, value in meta.items():
            out = torch.empty(value.shape, dtype=torch.bfloat16)
            if key.endswith("gamma"):
                yield out.fill_(0.1)
            elif key.endswith("periods"):
                yield rope_periods(spec.embed_dim // spec.num_heads, spec.rope_base).bfloat16()
            elif "norm" in key and key.endswith("weight"):
                yield out.fill_(1.0)
            else:
                yield out.normal_(std=0.02, generator=generator)

    shapes = {key: (tuple(value.shape), torch.bfloat16) for key, value in meta.items()}
    write_tensors(path, shapes, tensors(), metadata={"format": "pt"})


def peak_rss() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) << 10


def drop_cache(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(handle)


def read_seconds(path: Path) -> float:
    """To read the file once, not from the page cache."""
    drop_cache(path)
    buffer = memoryview(bytearray(16 << 20))
    start = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    return time.perf_counter() - start


def product_rate(spec: catalog.ViTSpec, *, clock: Callable[[], float], tokens: int = 8192) -> float:
    """FLOP/s of the model's largest products by oneDNN in bfloat16, by `clock`: the best of several."""
    x = torch.randn(tokens, spec.embed_dim).bfloat16()
    weight = torch.randn(spec.hidden_dim, spec.embed_dim).bfloat16()
    times = []
    with torch.inference_mode():
        for _ in range(8):
            start = clock()
            torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
            times.append(clock() - start)
    return 2 * tokens * weight.numel() / min(times)


def run_stream(path: Path, pixels: torch.Tensor, memory: str) -> tuple[float, Callable[[], torch.Tensor], str]:
    from densedino.engines.streamed import StreamEngine
    from densedino.weights.loading import load_stored

    start = time.perf_counter()
    engine = StreamEngine(load_stored(weights=path), memory=memory)
    loaded = time.perf_counter() - start
    return loaded, lambda: engine(pixels)[0].patches, str(engine.plan(pixels))


def run_accelerate(
    path: Path, pixels: torch.Tensor, dtype: torch.dtype, spec: catalog.ViTSpec
) -> tuple[float, Callable[[], torch.Tensor], str]:
    from accelerate import init_empty_weights, load_checkpoint_and_dispatch
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    config = DINOv3ViTConfig(
        hidden_size=spec.embed_dim,
        intermediate_size=spec.hidden_dim,
        num_hidden_layers=spec.depth,
        num_attention_heads=spec.num_heads,
        num_register_tokens=spec.num_register_tokens,
        use_gated_mlp=True,
        hidden_act="silu",
        query_bias=False,
        value_bias=False,
        key_bias=False,
    )
    start = time.perf_counter()
    with init_empty_weights():
        model = DINOv3ViTModel(config).eval().to(dtype)
    device_map = {"embeddings": "cpu", "rope_embeddings": "cpu", "norm": "cpu"}
    device_map |= {f"model.layer.{i}": "disk" for i in range(spec.depth)}
    folder = path.parent / f"offload-{dtype}"
    load_checkpoint_and_dispatch(model, str(path), device_map=device_map, offload_folder=str(folder), dtype=dtype)
    loaded = time.perf_counter() - start
    return loaded, lambda: model(pixels.to(dtype)).last_hidden_state, ""


def write_for_transformers(source: Path, target: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    from densedino.weights.dialects import from_meta

    with safe_open(source, framework="pt") as file:
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
    state = from_meta(state, "huggingface")
    save_file(
        {f"model.{k}" if k.startswith("layer.") else k: v for k, v in state.items()}, target, metadata={"format": "pt"}
    )


def child(args: argparse.Namespace) -> None:
    """One way, in a process of its own."""
    spec = use_depth(args.depth)
    torch.manual_seed(1)
    pixels = torch.randn(args.batch, 3, args.size, args.size)
    path = Path(args.file)
    if args.way == "stream":
        loaded, call, note = run_stream(path, pixels, args.memory)
    else:
        dtype = torch.bfloat16 if args.way.endswith("bf16") else torch.float32
        loaded, call, note = run_accelerate(path, pixels, dtype, spec)
    wall, busy = time.perf_counter(), time.process_time()
    with torch.no_grad():
        finite = bool(torch.isfinite(call()).all())
    wall, busy, peak = time.perf_counter() - wall, time.process_time() - busy, peak_rss()
    ideal = 2 * args.batch * multiplications(spec, side=args.size) / product_rate(spec, clock=time.process_time)
    print(json.dumps({"load": loaded, "seconds": wall, "cpu": busy, "peak": peak, "ideal": ideal, "note": note}))
    if not finite:
        raise SystemExit("features are not finite")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=40)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--memory", default="3GB")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--folder", type=Path, default=Path("/var/tmp"))
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--file", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        child(args)
        return
    spec = use_depth(args.depth)
    with tempfile.TemporaryDirectory(prefix="densedino-stream-", dir=args.folder) as folder:
        compare(args, spec, Path(folder))


def compare(args: argparse.Namespace, spec: catalog.ViTSpec, folder: Path) -> None:
    need = (0.5e9 + spec.depth * 0.34e9) * (2 if len(args.ways) > 1 else 1)
    if shutil.disk_usage(folder).free < 1.2 * need:
        raise SystemExit(f"{folder} has no {1.2 * need / 1e9:.0f} GB free; give another --folder or a smaller --depth")
    files = {"stream": folder / "vit7b16.safetensors"}
    write_model(files["stream"], spec)
    if len(args.ways) > 1:
        files["accelerate-bf16"] = files["accelerate-fp32"] = folder / "transformers.safetensors"
        write_for_transformers(files["stream"], files["accelerate-bf16"])
    macs = args.batch * multiplications(spec, side=args.size)
    print(f"{spec.depth} blocks of ViT-7B/16, {args.batch} images of {args.size} px, {torch.get_num_threads()} threads")
    print(f"file {files['stream'].stat().st_size / 1e9:.2f} GB, {macs / 1e12:.2f} T multiply-adds")
    seen: dict[str, list[dict[str, float]]] = {way: [] for way in args.ways}
    for number in range(args.rounds):
        for way in args.ways:
            read, before = read_seconds(files["stream"]), product_rate(spec, clock=time.perf_counter)
            drop_cache(files[way])
            options = [f"--{key}={getattr(args, key)}" for key in ("depth", "size", "batch", "memory")]
            command = [sys.executable, __file__, f"--way={way}", f"--file={files[way]}", *options]
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
            result = json.loads(done.stdout.splitlines()[-1])
            rate = max(before, product_rate(spec, clock=time.perf_counter))
            least = max(read, 2 * macs / rate)
            seen[way].append(result)
            print(
                f"round {number} {way:16} ready in {result['load']:.1f} s, {result['seconds']:.1f} s per batch, peak "
                f"{result['peak'] / 1e9:.2f} GB; the file is read in {read:.1f} s, products at {rate / 1e9:.0f} "
                f"GFLOP/s take {2 * macs / rate:.1f} s: {result['seconds'] / least:.2f} of the larger. Processor time "
                f"{result['cpu']:.1f} s, of the products alone {result['ideal']:.1f} s: "
                f"{result['cpu'] / result['ideal']:.2f}. {result['note']}",
                flush=True,
            )
    for key, what in (("seconds", "time"), ("cpu", "processor time")):
        ours = statistics.median(result[key] for result in seen[args.ways[0]])
        for way in args.ways[1:]:
            ratio = statistics.median(result[key] for result in seen[way]) / ours
            print(f"{way} takes {ratio:.2f} times the {what} of {args.ways[0]}")


if __name__ == "__main__":
    main()
