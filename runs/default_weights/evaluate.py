"""The three figures of the default weights, on held-out images: k-NN, CamVid probe, DAVIS propagation.

    evaluate.py WEIGHTS [WEIGHTS …] [--only knn camvid davis] [--quick] [--data shared/data]

WEIGHTS: a file that `dd.load` takes for vitt16, "default", "random", "teacher:lite0", "teacher:focus", or a
checkpoint of train.py. Written from the protocols' descriptions (DINO, arXiv 2104.14294, section 4; DAVIS-2016),
independently of the training code.
"""

from __future__ import annotations

import argparse
import glob
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
Backbone = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Pixels [B, 3, H, W] in 0…1 -> a vector an image [B, D] and a map [B, D', h, w]."""


def backbone(name: str) -> Backbone:
    """A backbone by name; see the module's first lines."""
    if name == "teacher:lite0":
        from teachers_local import Lite0

        net = Lite0().eval()

        def lite(x: Tensor) -> tuple[Tensor, Tensor]:
            middle, last = net((x * 255 - 127) / 128)
            return last.mean((2, 3)), middle

        return lite
    if name == "teacher:focus":
        from teachers_local import FocusViT

        vit = FocusViT(9)

        def focus(x: Tensor) -> tuple[Tensor, Tensor]:
            x = F.interpolate(x, size=(x.shape[2] // 14 * 14, x.shape[3] // 14 * 14), mode="bilinear", antialias=True)
            return vit(_normalise(x))

        return focus
    if name.endswith(".pt"):  # a training checkpoint: its average
        from densedino import create_model

        model = create_model("vitt16")
        state = torch.load(name, weights_only=True)
        model.load_state_dict(state.get("ema", state))
    else:
        from densedino.weights.loading import load_weights

        model, _ = load_weights("vitt16", weights=None if name == "default" else name, dtype=torch.float32)

    def ours(x: Tensor) -> tuple[Tensor, Tensor]:
        out = model.forward_features(_normalise(x))
        height, width = x.shape[2] // 16, x.shape[3] // 16
        return out["x_norm_clstoken"], out["x_norm_patchtokens"].transpose(1, 2).unflatten(2, (height, width))

    return ours


def _normalise(x: Tensor) -> Tensor:
    return (x - MEAN.view(3, 1, 1)) / STD.view(3, 1, 1)


def _read(path: str, size: tuple[int, int] | None = None) -> Tensor:
    """[3, H, W] in 0…1; size (height, width)."""
    image = Image.open(path).convert("RGB")
    if size is not None and image.size != size[::-1]:
        image = image.resize(size[::-1], Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def _run(model: Backbone, paths: list[str], size: tuple[int, int], batch: int) -> tuple[Tensor, Tensor]:
    parts = [model(torch.stack([_read(p, size) for p in paths[i : i + batch]])) for i in range(0, len(paths), batch)]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def knn(model: Backbone, data: Path, *, quick: bool, k: int = 20, temperature: float = 0.07) -> float:
    """Top-1 of a cosine-weighted k-NN (DINO, section 4.1): 150 bank images a class, queries the validation images."""
    rng = np.random.default_rng(0)
    bank, queries = [], []
    for label, folder in enumerate(sorted(glob.glob(str(data / "imagenette/train/*")))):
        files = sorted(os.listdir(folder))
        bank += [(f"{folder}/{files[i]}", label) for i in rng.permutation(len(files))[: 60 if quick else 150]]
        held = folder.replace("/train/", "/val/")
        files = sorted(os.listdir(held))
        queries += [(f"{held}/{f}", label) for f in (files[::5] if quick else files)]
    features = []
    for part in (bank, queries):
        vectors = [
            model(torch.stack([_read(p, (224, 224)) for p, _ in part[i : i + 16]]))[0] for i in range(0, len(part), 16)
        ]
        features.append(F.normalize(torch.cat(vectors), dim=-1))
    similarity, nearest = (features[1] @ features[0].T).topk(k)
    votes = (
        F.one_hot(torch.tensor([label for _, label in bank])[nearest], 10) * (similarity / temperature).exp()[..., None]
    )
    return float((votes.sum(1).argmax(-1) == torch.tensor([label for _, label in queries])).float().mean())


def camvid(model: Backbone, data: Path, *, quick: bool, size: tuple[int, int] = (352, 480)) -> float:
    """Mean IoU in percent of batch norm + 1×1 convolution on the frozen map, 11 classes, void left out."""
    sets = {}
    for split in ("train", "val"):
        paths = sorted(glob.glob(str(data / f"camvid/{split}/*.*")))[:: 3 if quick else 1]
        maps = _run(model, paths, size, 8)[1]
        names = [p.replace(f"/{split}/", f"/{split}annot/").rsplit(".", 1)[0] + ".png" for p in paths]
        labels = [np.array(Image.open(n).resize(size[::-1], Image.Resampling.NEAREST)) for n in names]
        sets[split] = (maps, torch.from_numpy(np.stack(labels)).long())
    maps, labels = sets["train"]
    torch.manual_seed(0)
    probe = torch.nn.Sequential(torch.nn.BatchNorm2d(maps.shape[1]), torch.nn.Conv2d(maps.shape[1], 11, 1))
    epochs, batch = 40, 8
    steps = epochs * (len(maps) // batch)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=3e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    small = (size[0] // 4, size[1] // 4)
    coarse = labels[:, 2::4, 2::4].clone()
    for _ in range(epochs):
        order = torch.randperm(len(maps))
        for i in range(0, len(maps) - batch + 1, batch):
            pick = order[i : i + batch]
            logits = F.interpolate(probe(maps[pick]), size=small, mode="bilinear")
            loss = F.cross_entropy(logits, coarse[pick], ignore_index=11)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    probe.eval()
    maps, labels = sets["val"]
    confusion = torch.zeros(11, 11)
    with torch.no_grad():
        for m, y in zip(maps, labels, strict=True):
            guess = F.interpolate(probe(m[None]), size=size, mode="bilinear")[0].argmax(0)
            real = y < 11
            confusion += torch.bincount(y[real] * 11 + guess[real], minlength=121).view(11, 11)
    hit = confusion.diagonal()
    return 100 * float((hit / (confusion.sum(0) + confusion.sum(1) - hit)).mean())


def davis(model: Backbone, data: Path, *, quick: bool, frames: int = 30, size: tuple[int, int] = (384, 688)) -> float:
    """Mean J of label propagation (DINO, section 4.2.2): first frame and the last 7, radius 12, top 5."""
    scores = []
    for folder in sorted(glob.glob(str(data / "davis/frames/*")))[:: 2 if quick else 1]:
        paths = sorted(glob.glob(f"{folder}/*.jpg"))[:frames]
        maps = F.normalize(_run(model, paths, size, 2)[1], dim=1)
        T, _, h, w = maps.shape
        masks = [np.array(Image.open(p.replace("/frames/", "/masks/").replace(".jpg", ".png"))) > 127 for p in paths]
        first = torch.from_numpy(np.stack(masks[0:1])).float()[None]
        first = F.interpolate(first, size=(h, w), mode="area")[0]
        soft = [torch.cat([1 - first, first])]
        rows, cols = torch.arange(h).repeat_interleave(w), torch.arange(w).repeat(h)
        reach = 12 * size[0] / 16 / 24  # in the cells of a 24-row grid
        scale = h / 24
        near = ((rows[:, None] - rows).abs() <= reach * scale) & ((cols[:, None] - cols).abs() <= reach * scale)
        for t in range(1, T):
            context = [0, *range(max(1, t - 7), t)]
            queries = maps[t].flatten(1).T
            keys = torch.stack([maps[c].flatten(1) for c in context])  # [C, D, N]
            similarity = (queries @ keys / 0.1).exp() * near  # [C, N, N]
            flat = similarity.transpose(0, 1).flatten(1)
            values, index = flat.topk(5, dim=-1)
            values = values / values.sum(-1, keepdim=True)
            labels = torch.stack([soft[c].flatten(1) for c in context], 1).flatten(1)  # [2, C N]
            soft.append((labels[:, index] * values).sum(-1).view(2, h, w))
            big = F.interpolate(soft[t][None], size=masks[t].shape, mode="bilinear")[0]
            guess = (big[1] > big[0]).numpy()
            scores.append((folder, (guess & masks[t]).sum() / max(1, (guess | masks[t]).sum())))
    return float(np.mean([np.mean([s for f, s in scores if f == folder]) for folder in sorted({f for f, _ in scores})]))


def main() -> None:
    """Print one line of JSON a backbone."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("weights", nargs="+")
    parser.add_argument("--only", nargs="+", default=["knn", "camvid", "davis"])
    parser.add_argument(
        "--quick", action="store_true", help="a part of the images: figures are lower and not comparable"
    )
    parser.add_argument("--data", type=Path, default=Path("/work/shared/data"))
    args = parser.parse_args()
    for name in args.weights:
        model = backbone(name)
        result: dict[str, object] = {"weights": name, "quick": args.quick}
        for protocol in args.only:
            start = time.time()
            with torch.no_grad() if protocol != "camvid" else torch.enable_grad():
                wrapped = torch.no_grad()(model)
                result[protocol] = round(
                    {"knn": knn, "camvid": camvid, "davis": davis}[protocol](wrapped, args.data, quick=args.quick), 4
                )
            result[protocol + "_s"] = round(time.time() - start)
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
