"""Every engine against transformers and timm in eager float32: same pixels, interleaved in one run; ratios of medians.

    python benchmarks/engines.py                                   ViT-S and ViT-B, 224 and 512 px, batch 1 and 8
    python benchmarks/engines.py --models vits16 --sizes 1024 --batches 1 --ways openvino:bf16
    python benchmarks/engines.py --clock cpu --threads 1           on a machine that others use too
    python benchmarks/engines.py --models vitt16 vits16 vitb16 vitl16 convnext_tiny --sizes 224 512 1024 --memory
                                                                   the whole grid, hours

A number is how many times as fast as transformers a way is (above 1: faster), with the least and the mean cosine of
its patch tokens with float32 eager. Weights are random, of a size such that every block does something: speed does not
depend on them. `--clock cpu` counts the CPU seconds of the process, which other programs hardly change. Peak memory
(`--memory`) is of a process that runs one way alone, besides what importing takes. The machine's matrix-multiply rate
is measured in the same run.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time
import warnings
from typing import TYPE_CHECKING

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.nn.functional as F

from densedino.engines.choice import build_engine, choose_engine
from densedino.engines.eager import EagerEngine
from densedino.models.catalog import ViTSpec, create_model
from densedino.weights.loading import load_weights

if TYPE_CHECKING:
    from collections.abc import Callable

    from densedino.models.convnext import ConvNeXt
    from densedino.models.vit import VisionTransformer

CPU = torch.device("cpu")
WAYS = ("eager:fp32", "eager:bf16", "openvino:fp32", "openvino:bf16", "openvino:int8", "quantize:int8", "onnx:fp32")
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
TIMM = {"vitt16": "vit_tiny_patch16_dinov3_qkvb", "vits16": "vit_small_patch16_dinov3_qkvb"}
TIMM |= {"vitb16": "vit_base_patch16_dinov3_qkvb", "vitl16": "vit_large_patch16_dinov3_qkvb"}
TIMM |= {"convnext_tiny": "convnext_tiny.dinov3_lvd1689m"}


def lively(name: str) -> VisionTransformer | ConvNeXt:
    """Random weights whose blocks change the tokens; the same in every process."""
    generator = torch.Generator().manual_seed(0)
    model = create_model(name)
    with torch.no_grad():
        for key, value in model.named_parameters():
            if key.endswith("gamma"):
                value.fill_(0.3)
            elif value.ndim > 1 and "token" not in key:
                value.copy_(torch.randn(value.shape, generator=generator) * value[0].numel() ** -0.5)
    return model


def transformers_eager(name: str) -> Callable[[torch.Tensor], object]:
    import transformers as hf

    spec = create_model(name, device="meta").spec
    if not isinstance(spec, ViTSpec):
        config = hf.DINOv3ConvNextConfig(depths=list(spec.depths), hidden_sizes=list(spec.dims))
        return hf.DINOv3ConvNextModel(config).eval()
    config = hf.DINOv3ViTConfig(
        hidden_size=spec.embed_dim,
        intermediate_size=spec.hidden_dim,
        num_hidden_layers=spec.depth,
        num_attention_heads=spec.num_heads,
        num_register_tokens=spec.num_register_tokens,
    )
    return hf.DINOv3ViTModel(config).eval()


def timm_eager(name: str) -> Callable[[torch.Tensor], object]:
    import timm

    options = {} if name.startswith("convnext") else {"dynamic_img_size": True}
    return timm.create_model(TIMM[name], **options).eval().forward_features


def way_of(way: str, model: VisionTransformer | ConvNeXt) -> Callable[[torch.Tensor], object]:
    engine, _, precision = way.partition(":")
    if engine == "quantize":  # calibrated, as by `densedino quantize`; on noise, like what is timed
        from densedino.engines.quantized import Quantized, calibrate, quantized_engine

        images = torch.randn(16, 1, 3, 224, 224, generator=torch.Generator().manual_seed(1))
        card = load_weights("debug_vit", weights="random")[1]
        return quantized_engine(Quantized(calibrate(model, list(images), to=precision), model, card, precision, {}))
    choice = choose_engine(engine, precision=precision or "auto", device=CPU, parameters=0)
    return build_engine(choice, model, device=CPU)


def medians(
    ways: dict[str, Callable[[torch.Tensor], object]], x: torch.Tensor, rounds: int, clock: str
) -> dict[str, float]:
    times: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(rounds + 1):
        for way, run in ways.items():
            start = CLOCKS[clock]()
            run(x)
            if number:  # the first round warms up
                times[way].append(CLOCKS[clock]() - start)
    return {way: statistics.median(values) for way, values in times.items()}


def matmul_peak(dtype: torch.dtype, clock: str) -> float:
    """GFLOP/s of a large square product, the best of a few."""
    a, b = torch.randn(2048, 2048).to(dtype), torch.randn(2048, 2048).to(dtype)
    best = min(medians({"mm": lambda _: a @ b}, a, 1, clock)["mm"] for _ in range(5))
    return 2 * 2048**3 / best / 1e9


def peak_memory(way: str, name: str, size: int, batch: int) -> str:
    """MiB that running a way takes at its peak, in a process of its own."""
    command = [
        sys.executable,
        __file__,
        "--alone",
        way,
        "--models",
        name,
        "--sizes",
        str(size),
        "--batches",
        str(batch),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else "failed"


def alone(way: str, name: str, size: int, batch: int) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peers = {"transformers": transformers_eager, "timm": timm_eager}
    run = peers[way](name) if way in peers else way_of(way, lively(name))
    with torch.no_grad():
        run(torch.randn(batch, 3, size, size))
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)


def compare(name: str, args: argparse.Namespace) -> None:
    model = lively(name)
    exact = EagerEngine(model, device=CPU, precision="fp32")
    ways: dict[str, Callable[[torch.Tensor], object]] = {"transformers": transformers_eager(name)}
    ways["timm"] = timm_eager(name)
    ways |= {way: way_of(way, model) for way in args.ways}
    for size in args.sizes:
        for batch in args.batches:
            x = torch.randn(batch, 3, size, size)
            took = medians(ways, x, args.rounds, args.clock)
            print(f"\n{name}, {size} px, batch {batch}: transformers {1000 * took['transformers']:.0f} ms", flush=True)
            want = exact(x)[0].patches
            for way, run in list(ways.items())[1:]:
                line = f"  {way:<15}{took['transformers'] / took[way]:6.2f} x"
                if way != "timm":
                    cosine = F.cosine_similarity(run(x)[0].patches, want, dim=-1)  # type: ignore[index]
                    line += f"   cosine min {cosine.min():.6f} mean {cosine.mean():.6f}"
                if args.memory:
                    line += f"   {peak_memory(way, name, size, batch)} MiB"
                print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["vits16", "vitb16"], choices=list(TIMM))
    parser.add_argument("--sizes", nargs="+", type=int, default=[224, 512])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument(
        "--ways", nargs="+", default=list(WAYS), help="engine:precision; also compile:bf16, quantize:int4 …"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--memory", action="store_true", help="peak memory of each too, in processes of their own")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    if args.alone:
        alone(args.alone, args.models[0], args.sizes[0], args.batches[0])
        return
    print(f"torch {torch.__version__}, {args.threads} threads, {args.clock} clock, medians of {args.rounds}")
    with torch.no_grad():
        for name in args.models:
            compare(name, args)
    for label, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        print(f"matrix-multiply peak, {label}: {matmul_peak(dtype, args.clock):.0f} GFLOP/s")


if __name__ == "__main__":
    main()
