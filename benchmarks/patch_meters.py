"""What faults in patches cost, and which meters see them: the ground for the rule in `densedino.pretrain.diagnosis`.

    python benchmarks/patch_meters.py --weights FILE --masks /data/camvid --ignore 11

Prints, for faults of rising strength in the patches of one model: CamVid-style mIoU of a linear probe, and every meter
relative to the model as it is. Nothing of it depends on time or chance. A fault is one of
  common      the CLS token added to every patch, as long training does
  noise       Gaussian noise on every channel
  both        the two of them
  artefacts   a share of the patches replaced by the CLS token
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import densedino as dd
from densedino.features.probes import confusion_matrix, fit_linear_probe, mean_iou, patch_shares
from densedino.images.labelled import read_mask, read_mask_folder
from densedino.pretrain.meters import cls_patch_cosine, coherence, similarity_drift

FAULTS = {"common": (0.25, 0.5, 1, 2), "noise": (0.25, 0.5, 1), "both": (0.25, 0.5, 1), "artefacts": (0.05, 0.1, 0.3)}


def faulty(patches: Tensor, cls: Tensor, fault: str, strength: float) -> Tensor:
    """[n, h, w, D] with a fault; `strength` is a share of patches, or relative to a channel's deviation."""
    generator = torch.Generator().manual_seed(0)
    common = strength * cls[:, None, None]
    noise = strength * torch.randn(patches.shape, generator=generator)
    hit = torch.rand(patches.shape[:3], generator=generator)[..., None] < strength
    if fault == "artefacts":
        return torch.where(hit, 3 * cls[:, None, None], patches)
    return patches + (common if fault != "noise" else 0) + (noise if fault != "common" else 0)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--weights")
    parser.add_argument("--model")
    parser.add_argument("--masks", type=Path, required=True)
    parser.add_argument("--ignore", type=int, default=255)
    parser.add_argument("--size", type=int, nargs=2, default=(224, 304))
    parser.add_argument("--images", type=int, nargs=2, default=(60, 40), help="to fit on, and to measure on")
    args = parser.parse_args()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dd.errors.UntrainedWarning)
        dino = dd.load(args.model, weights=args.weights, resize=tuple(args.size))
    train, val = read_mask_folder(args.masks).take(train=args.images[0], val=args.images[1])
    features = [dino(str(path)) for path, _ in (*train, *val)]
    dim = features[0].cls.shape[-1]
    patches = F.layer_norm(torch.cat([f.patches.cpu() for f in features]), (dim,))  # so that strengths mean the same
    cls = F.layer_norm(torch.cat([f.cls.cpu() for f in features]), (dim,))
    train_labels, val_labels = ([read_mask(mask) for _, mask in part] for part in (train, val))
    classes = 1 + max(int(x[x != args.ignore].max()) for x in (*train_labels, *val_labels))
    grid = (patches.shape[1], patches.shape[2])
    shares = [patch_shares(x, grid=grid, num_classes=classes, ignore=args.ignore).flatten(0, 1) for x in train_labels]

    def measure(x: Tensor) -> tuple[float, ...]:
        probe, _ = fit_linear_probe(x[: len(train)].flatten(0, 2), torch.cat(shares))
        counts = torch.zeros(classes, classes, dtype=torch.int64)
        for one, labels in zip(x[len(train) :], val_labels, strict=True):
            predicted = probe.predict(one, (labels.shape[0], labels.shape[1]))
            counts += confusion_matrix(predicted, labels, num_classes=classes, ignore=args.ignore)
        drift = similarity_drift(x.flatten(1, 2), patches.flatten(1, 2))
        return mean_iou(counts), coherence(x), cls_patch_cosine(cls, x.flatten(1, 2)), drift.structure

    sound = measure(patches)
    print(f"{dino!r}\n{len(train)} + {len(val)} images of {args.masks}, grid {grid[0]}×{grid[1]}")
    print(f"as it is: mIoU {sound[0]:.3f}, coherence {sound[1]:.3f}, cosine with CLS {sound[2]:.3f}\n")
    print(f"{'fault':<10} {'strength':>8}  {'mIoU':>6}  {'coherence':>9}  {'CLS cosine':>10}  {'drift':>6}")
    for fault, strengths in FAULTS.items():
        for strength in strengths:
            iou, near, to_cls, drift = measure(faulty(patches, cls, fault, strength))
            change, kept = iou / sound[0] - 1, near / sound[1] - 1
            print(
                f"{fault:<10} {strength:>8}  {change:>+6.1%}  {kept:>+9.1%}  {to_cls - sound[2]:>+10.3f}  {drift:>6.3f}"
            )


if __name__ == "__main__":
    main()
