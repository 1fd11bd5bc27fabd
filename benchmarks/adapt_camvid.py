"""Prints CamVid mIoU of a linear probe on the frozen default weights and of LoRA from it, on 5 % of the labels.

    python benchmarks/adapt_camvid.py camvid/

18 of 367 training images, drawn by the seed; the same for both. Scored once, on all 101 validation images at 480×360,
after the last step: nothing is chosen by them. In the end the last seed's adapter is exported, and its masks of every
fifth validation image in ONNX Runtime are compared with those of PyTorch.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import numpy as np

import densedino as dd
from densedino.adapters.adapt import AdaptConfig, Adapted, adapt
from densedino.adapters.batches import Augment
from densedino.adapters.export import export_adapter
from densedino.adapters.fit import FitConfig
from densedino.adapters.tasks import Task
from densedino.adapters.tuning import TuneConfig
from densedino.engines.onnx import OnnxSession


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--fraction", type=float, default=0.05)
    parser.add_argument("--steps", type=int, default=150, help="of LoRA")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--lr", type=float, default=3e-3, help="of LoRA")
    parser.add_argument("--tune", default="lora")
    parser.add_argument("--crop", type=int, default=224)
    parser.add_argument("-o", "--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        out = args.out or Path(scratch)
        results = [one(args, out, seed) for seed in args.seeds]
        row("frozen, linear", [r.frozen for r in results])
        row(f"{args.tune}, linear", [r.score for r in results])
        row("gain", [r.score - (r.frozen or 0) for r in results])
        compare(results[-1], args.data)


def one(args: argparse.Namespace, out: Path, seed: int) -> Adapted:
    together = FitConfig(
        steps=args.steps, every=args.steps, batch_size=args.batch_size, lr=args.lr, patience=0, weight_decay=1e-2
    )
    config = AdaptConfig(
        task=Task(kind="segmentation", ignore=11),
        tune=TuneConfig(kind=args.tune, rank=args.rank, alpha=2 * args.rank, lr_multiplier=1.0),
        fit=FitConfig(steps=400, every=400, batch_size=8, patience=0),
        fit_together=together,
        augment=Augment(crop=args.crop),
        fraction=args.fraction,
        seed=seed,
    )
    return adapt(args.data, config=config, output=out / f"seed{seed}", features=out / "features", say=print)


def row(name: str, values: list[float]) -> None:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    print(f"{name:<16} {statistics.mean(values):.2f} ± {spread:.2f}   {[round(v, 2) for v in values]}", flush=True)


def compare(result: Adapted, data: Path) -> None:
    adapter = dd.load_adapter(result.output)
    path = result.output / "masks.onnx"
    path.unlink(missing_ok=True)
    export_adapter(adapter, path)
    session = OnnxSession(path)
    same = []
    for image in sorted((data / "val").iterdir())[::5]:
        prepared = adapter.dino.transform(image)
        labels = session(prepared.pixels[None])[0][0]
        height, width = prepared.input_size
        same.append(float((labels[:height, :width] == adapter.predict(prepared).labels).float().mean()))
    print(f"ONNX             {100 * np.mean(same):.4f} % of pixels the same, least {100 * min(same):.4f} %")


if __name__ == "__main__":
    main()
