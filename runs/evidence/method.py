"""Prints what each part of the method is worth at a scale that runs here: mean ± std over seeds, against one base run.

    python runs/evidence/method.py OUT                       every variant, seeds 0 1 2; goes on where it stopped
    python runs/evidence/method.py OUT --variants base no_ibot --seeds 0 --steps 300
    python runs/evidence/method.py OUT --table               only what is done so far

A ViT of 1.2 M parameters (128 wide, 6 blocks), 2 crops of 96 and 8 of 48 pixels, batch 64, from random weights, on
Imagenette's training images (`../shared/data`), one thread. Measured at the end of each run by the library's own
monitor: weighted 20-NN of validation images among 100 training images a class, and a linear probe of CamVid's masks.
Two stages are compared at equal steps: pretraining gone on with, against Gram anchoring, against high resolution.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from densedino.models.catalog import ViTSpec
from densedino.pretrain.look_files import read_looks
from densedino.pretrain.schedules import constant
from densedino.pretrain.settings import DataConfig, HeadConfig, MonitorConfig, SnapshotConfig, SourceConfig
from densedino.pretrain.trainer import pretrain
from densedino.recipes.one_machine import Scale, three_stages

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from densedino.pretrain.settings import LossConfig, RunConfig

DATA = Path(__file__).parents[3] / "shared" / "data"
SPEC = ViTSpec(name="evidence", embed_dim=128, depth=6, num_heads=2, hidden_dim=512)
MEASURES = ("knn", "miou", "coherence", "effective_rank")


def whole(steps: int) -> RunConfig:
    """All three stages: pretraining, and two of a third of its steps each."""
    scale = Scale(
        images=steps * 64,
        epochs=1,
        batch_size=64,
        num_prototypes=2048,
        size=(96, 48),
        highres=((160, 48, 0.5), (192, 80, 0.5)),
    )
    run = three_stages("debug_vit", scale, drop_path=0.0)
    head = HeadConfig(hidden_dim=512, bottleneck_dim=128, num_prototypes=2048)
    monitor = MonitorConfig(
        knn=str(DATA / "imagenette"),
        segmentation=str(DATA / "camvid"),
        ignore_label=11,
        size=160,
        seconds=1e9,
        look_every=10**9,  # the first step and the last
    )
    return replace(
        run,
        model=SPEC,
        dino_head=head,
        ibot_head=head,
        data=DataConfig(sources=(SourceConfig(path=str(DATA / "imagenette" / "train")),), workers=0),
        snapshots=SnapshotConfig(every=50, keep=1),
        monitor=monitor,
    )


def losses(run: RunConfig, change: Callable[[LossConfig], LossConfig]) -> RunConfig:
    return replace(run, stages=tuple(replace(stage, losses=change(stage.losses)) for stage in run.stages))


def base(steps: int) -> RunConfig:
    run = whole(steps)
    return replace(run, stages=run.stages[:1])


def second(steps: int, kind: str) -> RunConfig:
    """Pretraining, and as many steps again at a constant rate: alike, with Gram anchoring, or at high resolution."""
    run = whole(steps)
    first, gram, highres = run.stages
    after = replace(highres if kind.startswith("highres") else gram, start="previous", steps=steps, batch_size=64)
    rate = replace(after.optimizer, lr=constant(2e-4))
    after = replace(after, name="after", optimizer=rate)
    if not kind.endswith("gram"):
        crops = tuple(replace(r, crops=replace(r.crops, gram_size=None)) for r in after.resolutions)
        after = replace(after, losses=replace(after.losses, gram=None), resolutions=crops)
    return replace(run, stages=(first, after))


VARIANTS: dict[str, Callable[[int], RunConfig]] = {
    "base": base,
    "no_ibot": lambda steps: losses(base(steps), lambda x: replace(x, ibot_weight=0.0)),
    "no_dino": lambda steps: losses(base(steps), lambda x: replace(x, dino_weight=0.0)),
    "no_koleo": lambda steps: losses(base(steps), lambda x: replace(x, koleo_weight=0.0)),
    "no_registers": lambda steps: replace(base(steps), model=replace(SPEC, num_register_tokens=0)),
    "longer": lambda steps: second(steps, "longer"),
    "longer_gram": lambda steps: second(steps, "longer_gram"),
    "highres": lambda steps: second(steps, "highres"),
    "highres_gram": lambda steps: second(steps, "highres_gram"),
}


def table(out: Path, variants: list[str], seeds: list[int]) -> None:
    print(f"{'variant':<14}{'runs':>5}" + "".join(f"{name:>22}" for name in MEASURES))
    for variant in variants:
        ends = [looks[-1].measures for seed in seeds if len(looks := read_looks(out / f"{variant}-{seed}")) > 1]
        cells = []
        for name in MEASURES:
            values = [end[name] for end in ends if name in end]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.4f} ± {spread:.4f}" if values else "–")
        print(f"{variant:<14}{len(ends):>5}" + "".join(f"{cell:>22}" for cell in cells), flush=True)


def options(text: str | None, kind: str, known: Iterable[str]) -> argparse.Namespace:
    """What the command line says; `--KIND` chooses among the known ones, all by default."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument(f"--{kind}", nargs="+", choices=known, default=list(known))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--table", action="store_true")
    return parser.parse_args()


def main() -> None:
    args = options(__doc__, "variants", VARIANTS)
    torch.set_num_threads(1)
    for seed in [] if args.table else args.seeds:
        for variant in args.variants:
            output = args.out / f"{variant}-{seed}"
            if not (output / "model.safetensors").exists():
                pretrain(replace(VARIANTS[variant](args.steps), seed=seed), output=output)
                table(args.out, args.variants, args.seeds)
    table(args.out, args.variants, args.seeds)


if __name__ == "__main__":
    main()
