"""Forward speed against transformers and timm: same shapes, same machine, interleaved in one run; medians and ratios.

    python benchmarks/forward.py                       ViT-S and ViT-B at 224, 512 and 1024 px, float32 and bfloat16
    python benchmarks/forward.py --models vits16 --sizes 224 --rounds 15

Weights are random: speed does not depend on them. The ratio is the faster peer's median over ours (above 1: we are
faster). The machine's own matrix-multiply rate is printed beside it, measured in the same run.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from typing import TYPE_CHECKING

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import timm
import torch
from transformers import DINOv3ViTConfig, DINOv3ViTModel

import densedino as dd

if TYPE_CHECKING:
    from collections.abc import Callable

TIMM = {
    "vitt16": "vit_tiny_patch16_dinov3_qkvb",
    "vits16": "vit_small_patch16_dinov3_qkvb",
    "vitb16": "vit_base_patch16_dinov3_qkvb",
    "vitl16": "vit_large_patch16_dinov3_qkvb",
}
BATCH = {224: 8, 512: 2, 1024: 1}


def contenders(name: str, x: torch.Tensor) -> dict[str, Callable[[], object]]:
    ours = dd.create_model(name, dtype=x.dtype)
    spec = ours.spec
    config = DINOv3ViTConfig(
        hidden_size=spec.embed_dim,
        intermediate_size=spec.hidden_dim,
        num_hidden_layers=spec.depth,
        num_attention_heads=spec.num_heads,
        num_register_tokens=spec.num_register_tokens,
    )
    huggingface = DINOv3ViTModel(config).eval().to(x.dtype)
    pytorch_image_models = timm.create_model(TIMM[name], dynamic_img_size=True).eval().to(x.dtype)
    return {
        "densedino": lambda: ours.forward_features(x),
        "transformers": lambda: huggingface(x),
        "timm": lambda: pytorch_image_models.forward_features(x),
    }


def interleaved(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    times: dict[str, list[float]] = {key: [] for key in functions}
    for number in range(rounds + 1):
        for key, function in functions.items():
            start = time.perf_counter()
            function()
            if number:  # the first round warms up
                times[key].append(time.perf_counter() - start)
    return {key: statistics.median(values) for key, values in times.items()}


def matmul_peak(dtype: torch.dtype) -> float:
    """GFLOP/s of a large square product, the best of a few."""
    a, b = torch.randn(2048, 2048).to(dtype), torch.randn(2048, 2048).to(dtype)
    best = min(interleaved({"mm": lambda: a @ b}, 3)["mm"] for _ in range(3))
    return 2 * 2048**3 / best / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["vits16", "vitb16"], choices=list(TIMM))
    parser.add_argument("--sizes", nargs="+", type=int, default=[224, 512, 1024])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, median of {args.rounds}, ms per batch")
    print("model    dtype        px batch  densedino  transformers      timm  ratio")
    with torch.inference_mode():
        for name in args.models:
            for dtype_name in args.dtypes:
                dtype = getattr(torch, dtype_name)
                for size in args.sizes:
                    x = torch.randn(BATCH.get(size, 1), 3, size, size).to(dtype)
                    ms = {k: 1e3 * v for k, v in interleaved(contenders(name, x), args.rounds).items()}
                    ratio = min(ms["transformers"], ms["timm"]) / ms["densedino"]
                    print(
                        f"{name:8} {dtype_name:9} {size:5} {x.shape[0]:5} {ms['densedino']:10.1f} "
                        f"{ms['transformers']:13.1f} {ms['timm']:9.1f} {ratio:6.2f}",
                        flush=True,
                    )
        for dtype_name in args.dtypes:
            print(f"matrix-multiply peak, {dtype_name}: {matmul_peak(getattr(torch, dtype_name)):.0f} GFLOP/s")


if __name__ == "__main__":
    main()
